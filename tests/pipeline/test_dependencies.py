"""dvc.yaml names for each stage all the code that makes its result."""

from __future__ import annotations

import ast
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# Code that stages run and that has no part in their results: parameters (which dvc.yaml names one by one),
# records, errors, processes, and what a killed stage goes on from.
NO_RESULTS = {
    *(
        f"popen/{name}.py"
        for name in ("params", "pipeline", "tracking", "mlflow_requests", "uploads", "errors")
    ),
    *(f"popen/{name}.py" for name in ("launch", "orphans", "alone", "checkpoints")),
    *(f"popen/stages/{name}.py" for name in ("run", "kept", "model_record")),
}


def imported(module: str) -> set[str]:
    """Files of this package that one of them imports, but for those that only types are taken from."""
    tree, found = ast.parse((ROOT / module).read_text()), set[str]()
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    types = [node for block in blocks if "TYPE_CHECKING" in ast.dump(block.test) for node in ast.walk(block)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in types:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found.update(f"{name.replace('.', '/')}.py" for name in names)
    return {file for file in found if file.startswith("popen/") and (ROOT / file).is_file()}


def test_stages_depend_on_the_code_that_makes_their_results() -> None:
    """A mended decoder of images once left every trained model up to date."""
    missing = dict[str, set[str]]()
    for name, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        deps, waiting, seen = set(entry.get("do", entry)["deps"]), [f"popen/stages/{name}.py"], set[str]()
        while waiting:
            file = waiting.pop()
            if file in seen or file in NO_RESULTS:
                continue
            seen.add(file)
            if not deps & {file, *map(str, Path(file).parents)}:
                missing.setdefault(name, set()).add(file)
            # what the files of popen/data import reads the native layouts: its result is the index
            waiting += imported(file) if not file.startswith("popen/data/") else ()
    assert missing == {}
