"""Small DVC projects whose stages are shell commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the outer environment names a place for records, and `dvc` is the one beside this python."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "POPEN_", "DVC_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's: to make one takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("records") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def make(tmp_path: Path, records: Path) -> Make:
    """Make a project in `tmp_path/project` with these stages (name -> entry of dvc.yaml) and parameters."""

    def make_project(stages: dict[str, Any], **params: Any) -> Path:
        root = tmp_path / "project"
        (root / ".dvc").mkdir(parents=True)
        # without a site folder of its own DVC leaves locks and indices in one of the whole machine
        settings = f"[core]\n    analytics = false\n    site_cache_dir = {tmp_path / 'site'}\n"
        (root / ".dvc/config").write_text(settings)
        (root / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        for words in (["init"], ["config", "user.name", "test"], ["config", "user.email", "t@example.org"]):
            subprocess.run(["git", *words], cwd=root, check=True, stdout=subprocess.DEVNULL)
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        (root / ".gitignore").write_text(".popen/\nmlflow.db*\n*.here\n")
        shutil.copy(records, root)
        commit(root)
        return root

    return make_project


def commit(root: Path) -> None:
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "state"], cwd=root, check=True)


def import_data(root: Path, source: str | Path) -> None:
    """Make `data.dvc`, an import that follows its source."""
    subprocess.run(["dvc", "import-url", "-q", str(source), "data"], cwd=root, check=True)
    file = root / "data.dvc"
    file.write_text(file.read_text().replace("frozen: true\n", ""))


def lock(root: Path) -> Any:
    """What dvc.lock says; the order of its stages is that in which they ended."""
    return yaml.safe_load((root / "dvc.lock").read_text())


def status(root: Path) -> Any:
    done = subprocess.run(["dvc", "status", "--json"], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def stage(cmd: str, out: str | None = None, *deps: str, **more: Any) -> dict[str, Any]:
    """An entry of dvc.yaml."""
    return {"cmd": cmd, **({"deps": list(deps)} if deps else {}), **({"outs": [out]} if out else {}), **more}
