"""Draw the scenes of params.yaml: `python -m popen.data.scenes OUT [PARAMS]`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from popen.data.scenes.export import write_tree
from popen.params import ScenesParams

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source = Path(sys.argv[2] if len(sys.argv) == 3 else "params.yaml")
    section = yaml.safe_load(source.read_text(encoding="utf-8"))["scenes"]
    write_tree(Path(sys.argv[1]), ScenesParams.model_validate(section))
