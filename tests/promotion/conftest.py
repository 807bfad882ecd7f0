"""A clone with results, as far as the registry looks at it, and its MLflow database."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from popen.ensemble.attention import RefinementAttention
from popen.model.segmenter import Segmenter
from popen.predict import write_bundle
from popen.promotion.registry import NAME, connect
from popen.stages.artifacts import BUNDLE
from popen.stages.model_record import record
from tests.test_predict import SCORE, settings

ROOT = Path(__file__).parents[2]
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")


@pytest.fixture(scope="session")
def weights(taught: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle."""
    root = tmp_path_factory.mktemp("weights")
    taught.save(root / "saved")
    attention = RefinementAttention(taught.codebook.scales, taught.params.decoder.width)
    small = settings(members=2)
    write_bundle(root / "bundle", root / "saved", None, SCORE, attention, replace(small, threshold=0.0))
    return root / "bundle"


@pytest.fixture(scope="module")
def clone(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results without a database."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("params.yaml", "data.dvc", "dvc.lock"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "metrics", clone / "metrics")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    subprocess.run(["git", "add", "params.yaml"], cwd=clone, check=True)
    subprocess.run([*GIT, "commit", "-qm", "first"], cwd=clone, check=True)
    (clone / ".dvc").mkdir()
    shutil.copytree(weights, clone / BUNDLE)
    return clone


@pytest.fixture(scope="module")
def client(clone: Path) -> Iterator[MlflowClient]:
    """The clone's MLflow, in which the bundle is recorded, as the stage calibrate does."""
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = f"sqlite:///{clone / 'mlflow.db'}"
        made = MlflowClient(uri)
        experiment = made.create_experiment("popen", (clone / "mlartifacts").as_uri())
        record(uri, made.create_run(experiment).info.run_id, clone / BUNDLE)
        yield connect(clone)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def empty(client: MlflowClient) -> Iterator[MlflowClient]:
    """No version is left from another test."""
    yield client
    client.delete_registered_model(NAME)
