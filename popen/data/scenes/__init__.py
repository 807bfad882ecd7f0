"""Table-top scenes drawn by our own code, with exact masks, questions and the four native layouts."""

from popen.data.scenes.export import write_tree

__all__ = ["write_tree"]
