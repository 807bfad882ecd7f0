"""What `retrain` made on a worker, whose clone is gone afterwards, comes back from registry and remote."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mlflow
import pytest

from flows.retraining import retrain
from popen.checkpoints import digest
from popen.promotion import registry
from popen.stages.artifacts import BUNDLE
from tests.flows.test_retraining import prefect, project

pytestmark = pytest.mark.slow

__all__ = ["prefect", "project"]  # fixtures


def test_lineage_and_remote_bring_the_results_back(
    project: Path, prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [["dvc", "remote", "add", "-d", "store", str(tmp_path / "store")]]
    words += [["git", "add", "-A"], ["git", "commit", "-qm", "a remote"]]
    words.append(["git", "clone", "-q", str(project), str(tmp_path / "later")])
    for command in words:
        subprocess.run(command, cwd=project, check=True)
    assert retrain(share=True).startswith("Version 1 is the champion.")
    made = digest(project / BUNDLE)
    for folder in ("artifacts", ".dvc/cache"):
        shutil.rmtree(project / folder)

    client = registry.connect(project)
    version = registry.version(client, registry.CHAMPION)
    assert version is not None
    later = tmp_path / "later"
    subprocess.run(["git", "checkout", "-q", version.tags["git.commit"]], cwd=later, check=True)
    uri = f"models:/{registry.NAME}/{version.version}"
    mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "version"))
    for name in registry.LINEAGE_FILES:
        shutil.copy(tmp_path / "version/lineage" / version.tags["dvc.lock"] / name, later)
    subprocess.run(["dvc", "pull", "-q"], cwd=later, check=True)
    assert digest(later / BUNDLE) == made == version.tags["bundle"]

    # with an empty database of MLflow's in place of a lost one; the files come from the remote
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    assert retrain(share=True).startswith("Version 1 is the champion.")
    anew = registry.version(registry.connect(project), registry.CHAMPION)
    assert anew is not None
    assert anew.tags == version.tags | {registry.GATE: anew.tags[registry.GATE]}
