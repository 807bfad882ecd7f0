"""The same questions for both: the challenger's answers lie on the disk, the champion is asked now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pandas import DataFrame

from popen import devices
from popen.evaluation.answering import prediction
from popen.evaluation.benchmark import rows
from popen.evaluation.prediction import read_predictions
from popen.params import Params
from popen.parts import in_batches
from popen.predict import load_ensemble
from popen.promotion.gate import GateError
from popen.promotion.registry import RegistryError
from popen.samples import Sample, read_index
from popen.stages.artifacts import index, predictions
from popen.stages.systems import answerer

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def check_gate(params: Params) -> None:
    """Raises GateError when the pipeline does not evaluate what the gate names."""
    gate = params.gate
    for key, value, known in (
        ("benchmark", gate.benchmark, params.benchmarks),
        ("system", gate.system, params.systems),
    ):
        if value not in known:
            raise GateError(
                f"gate.{key}: {value} is not among the {key}s ({', '.join(known)}); name one of them"
            )


def questions(root: Path, params: Params) -> list[Sample]:
    """The gate's questions."""
    return list(read_index(root / index(params.gate.benchmark)))


def challenger_rows(root: Path, params: Params, asked: Sequence[Sample]) -> DataFrame:
    """Rows of what the stage `evaluate` wrote, whose questions must be those `asked`."""
    gate = params.gate
    path = root / predictions(gate.benchmark, gate.system)
    return rows(asked, list(read_predictions(path)))


def champion_rows(bundle: Path, root: Path, params: Params, asked: Sequence[Sample]) -> DataFrame:
    """Rows of a bundle's answers, asked as the stage `evaluate` asks, with the bundle's own settings."""
    data = params.data.model_copy(update={"root": str(root / params.data.root)})
    loaded, settings = load_ensemble(bundle)
    ensemble = loaded.to(devices.device())
    longest = params.evaluate.model_copy(update={"max_new_tokens": settings.max_new_tokens})
    here = params.model_copy(update={"data": data, "evaluate": longest, "ensemble": settings.ensemble})
    ask = answerer(ensemble.model if params.gate.system == "popen" else ensemble, here, asked)
    found = in_batches(range(0, len(asked), longest.batch), ask, "champion", None)
    with devices.autocast(settings.bf16):
        said = [prediction(sample, answer, settings.threshold, seconds) for sample, answer, seconds in found]
    return rows(asked, said)


def download(version: ModelVersion, folder: Path) -> Path:
    """The bundle of a registered version, fetched into `folder`. Raises RegistryError where it is gone."""
    import mlflow

    uri = f"models:/{version.name}/{version.version}"
    fetched = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
    found = next(Path(fetched).glob("artifacts/*/settings.json"), None)
    if found is None:
        raise RegistryError(
            f"the files of version {version.version} are gone from where MLflow's database has them; where "
            "the clone or `mlartifacts/` was moved or restored elsewhere, bring it back, or link the old "
            "place to it"
        )
    return found.parent
