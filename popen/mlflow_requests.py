"""Single requests to MLflow: names and sizes that it takes, and what its errors mean."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.tracking import MlflowClient

Point = tuple[str, float, int, int]  # of a metric: name, value, time in ms, step

_BATCH = 90  # parameters or tags a request (MLflow takes 100)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as dotted names: {"sft": {"train": {"lr": 0.1}}} -> {"sft.train.lr": "0.1"}."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[legal(f"{prefix}{key}")] = value if isinstance(value, str) else json.dumps(value)
    return flat


def legal(name: str) -> str:
    """A name that MLflow accepts: "refcoco+/cIoU" -> "refcoco_plus/cIoU", "align@fine" -> "align_fine"."""
    return re.sub(r"[^\w./\- :]", "_", re.sub(r"\+(?=\w)", "_plus_", name).replace("+", "_plus"))


def log_params(client: MlflowClient, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(entities), _BATCH):
        client.log_batch(run, params=entities[start : start + _BATCH])


def log_tags(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    entities = [RunTag(name, value[:5000]) for name, value in tags.items()]
    for start in range(0, len(entities), _BATCH):
        client.log_batch(run, tags=entities[start : start + _BATCH])


def log_points(client: MlflowClient, run: str, points: Sequence[Point]) -> None:
    """Metrics, 1000 at most."""
    from mlflow.entities import Metric

    client.log_batch(run, metrics=[Metric(*point) for point in points])


def log_path(client: MlflowClient, run: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run, str(path), str(Path(folder or "", path.name)))
    else:
        client.log_artifact(run, str(path), folder)


def dataset_input(digest: str) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": "data", "dvc": "data.dvc"})
    data = Dataset(name="data", digest=digest[:36], source_type="local", source=source)
    return DatasetInput(data, [InputTag("mlflow.data.context", "pipeline")])


def end_run(client: MlflowClient, run: str, status: str) -> None:
    """End a run; one that was deleted needs no end."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_terminated(run, status)
    except MlflowException:
        if not is_lost(client, run):
            raise


def resumed(client: MlflowClient, run: str) -> bool:
    """Set a run to running again; returns False where it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run, status="RUNNING")
    except MlflowException:
        if not is_lost(client, run):
            raise
        return False
    return True


def is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's means that its server or database does not answer, so that a later try
    may help."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, faults())


def faults() -> tuple[type[Exception], ...]:
    """What MLflow raises."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return OSError, MlflowException, SQLAlchemyError


def is_refusal(error: BaseException) -> bool:
    return getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def is_lost(client: MlflowClient, run: str) -> bool:
    """Whether a run was deleted, or even purged (`mlflow gc`), so that nothing can be written to it."""
    try:
        return str(client.get_run(run).info.lifecycle_stage) != "active"
    except faults() as error:
        return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" or is_refusal(error)
