"""MLflow's registry of the model `popen`: versions with their lineage, and who is the champion.

Each step can be killed and done again. A version is made with all of its tags in one request, keyed by the
digest of `dvc.lock`. The aliases move by a note that is written first (`move`, a tag of the registered
model) and taken off last; whoever comes next finishes what a note says. Until `champion` itself moves, which
is one request, the old one serves.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popen import params as parameters
from popen import pipeline
from popen.checkpoints import digest
from popen.errors import one_line, without_password
from popen.params import GateParams
from popen.promotion.gate import Verdict
from popen.stages.artifacts import BUNDLE
from popen.stages.model_record import BUNDLE_TAG
from popen.tracking import EXPERIMENT, quieten, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

NAME = "popen"
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LOCK, GATE, ROLLED_BACK = "dvc.lock", "gate", "rolled_back"  # tags of a version
LINEAGE_FILES = ("dvc.lock", "data.dvc", "params.yaml")  # copied beside the model, see `facts_folder`
_WRITTEN = ("dvc.lock", "data.dvc", "metrics")  # tracked files that a run changes
_MOVE = "move"  # tag of the registered model: aliases that are on their way
_DESCRIPTION = 5000  # characters that MLflow's database takes


class RegistryError(RuntimeError):
    """The registry cannot do what was asked; the message says why and what to do."""


class NoRegistryError(RegistryError):
    """Nothing was ever recorded here."""


class AwayError(RegistryError):
    """MLflow does not answer now."""


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from and what it measured."""

    commit: str  # with "-dirty" where the tree was not that of the commit
    lock: str  # MD5 of dvc.lock
    data: str  # DVC's hash of data/
    bundle: str  # digest of the bundle's files
    params: dict[str, Any]
    figures: dict[str, Any]  # benchmark -> system (baseline, controls, ours) -> metric

    def tags(self) -> dict[str, str]:
        return {
            "git.commit": self.commit,
            LOCK: self.lock,
            "data": self.data,
            BUNDLE_TAG: self.bundle,
            "params": json.dumps(self.params),
            "figures": json.dumps(self.figures),
        }


def lineage(root: Path) -> Lineage:
    """The lineage of the results that lie in the clone `root`. Raises RegistryError for what is missing."""
    summary = root / "metrics/summary.json"
    known = {
        "a git commit": _commit(root),
        "dvc.lock": pipeline.lock_digest(root),
        "the hash of data/": pipeline.data_hash(root),
        f"{BUNDLE}": digest(root / BUNDLE) if (root / BUNDLE).is_dir() else None,
        f"{summary.relative_to(root)}": summary.read_text(encoding="utf-8") if summary.is_file() else None,
    }
    lost = [name for name, value in known.items() if value is None]
    if lost:
        raise RegistryError(f"{root}: no {', no '.join(lost)}; run `dvc repro` in a git clone of the project")
    commit, lock, data, bundle, text = (str(value) for value in known.values())
    figures = {name: value for name, value in json.loads(text).items() if name != "comparisons"}
    params = parameters.load(root / "params.yaml").model_dump(mode="json")
    return Lineage(commit, lock, data, bundle, params, figures)


def connect(home: Path) -> MlflowClient:
    """A client of the clone's registry. Raises NoRegistryError where there is none, AwayError where it does
    not answer."""
    uri = tracking_uri(home)
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.is_file():
        raise NoRegistryError(
            f"no registry yet ({path} is not there); `python -m flows.retraining` makes one"
        )
    quieten()
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    mlflow.set_tracking_uri(uri)  # models:/ addresses are looked up at the process's own
    client = MlflowClient(uri)
    try:
        client.search_registered_models(max_results=1)
    except (OSError, MlflowException, SQLAlchemyError) as error:
        says = f"MLflow at {uri} cannot be reached ({one_line(error)}); start it, or set MLFLOW_TRACKING_URI"
        raise AwayError(without_password(says)) from None
    return client


def versions(client: MlflowClient) -> list[ModelVersion]:
    """All versions, the oldest first; none where nothing was ever registered."""
    found = client.search_model_versions(f"name = '{NAME}'", max_results=10_000)
    return sorted(found, key=lambda version: int(version.version))


def aliases(client: MlflowClient) -> dict[str, str]:
    """Alias -> version."""
    found = client.search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}


def version(client: MlflowClient, alias: str) -> ModelVersion | None:
    """The version that an alias names."""
    number = aliases(client).get(alias)
    return None if number is None else client.get_model_version(NAME, number)


def recorded(client: MlflowClient, bundle: str) -> LoggedModel | None:
    """The newest logged model made of the bundle with this digest."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    found = client.search_logged_models(
        [experiment.experiment_id],
        f"tags.{BUNDLE_TAG} = '{bundle}'",
        order_by=[{"field_name": "creation_time", "ascending": False}],
    )
    return next((model for model in found if model.status == "READY"), None)


def facts_folder(lock: str) -> str:
    """Where a version's card and lineage files lie beside its model. Versions of the same weights share the
    model, so each has a folder of its own."""
    return f"lineage/{lock}"


def register(client: MlflowClient, root: Path, facts: Lineage, card: str) -> ModelVersion:
    """The version of `facts`, found again or made; the challenger unless it was already judged good.

    `card` is Markdown; it lies beside the model as MODEL_CARD.md, with the lineage files.
    Raises RegistryError when the bundle was never recorded.
    """
    _create_model(client)
    finish(client)
    if not _of_lock(client, facts.lock):
        model = recorded(client, facts.bundle)
        if model is None:
            raise RegistryError(
                f"{BUNDLE} was never recorded in MLflow; run the flow `retrain`, it does that"
            )
        folder = facts_folder(facts.lock)
        for path in (_written(root / "artifacts/MODEL_CARD.md", card), *(root / n for n in LINEAGE_FILES)):
            client.log_model_artifact(model.model_id, str(path), folder)
        client.create_model_version(
            NAME,
            model.artifact_location,
            model.source_run_id,
            facts.tags(),
            description=f"Not judged yet. The model card lies beside the model: {folder}/MODEL_CARD.md",
            model_id=model.model_id,
        )
    # Another clone may have made one meanwhile: all that did keep the first, whose number they all see.
    found, *doubles = _of_lock(client, facts.lock)
    for double in doubles:
        _delete(client, double)
    if str(found.version) not in (aliases(client).get(CHAMPION), aliases(client).get(PREVIOUS)):
        _point(client, CHALLENGER, str(found.version))
    return client.get_model_version(NAME, found.version)


def promote(
    client: MlflowClient,
    challenger: ModelVersion,
    verdict: Verdict,
    against: ModelVersion | None,
    gate: GateParams,
) -> bool:
    """Write the verdict to the version and, if it passed, make it the champion; returns whether it is.

    `against` is the champion that the verdict compared with, by the rules of `gate`. Raises RegistryError
    when another one has taken its place meanwhile.
    """
    finish(client)
    number, now = str(challenger.version), aliases(client).get(CHAMPION)
    if now != (None if against is None else str(against.version)):
        raise RegistryError(
            f"the champion changed to version {now} while version {number} was judged; run `retrain` again"
        )
    rules = gate.model_dump(mode="json")
    figures = verdict.to_dict() | {"against": now, "gate": rules, "at": _now()}
    client.set_model_version_tag(NAME, number, GATE, json.dumps(figures))
    opponent = "" if now is None else f" (champion: version {now})"
    client.update_model_version(NAME, number, (verdict.words + opponent)[:_DESCRIPTION])
    if verdict.passed:
        _move(client, {CHAMPION: number, PREVIOUS: now})
    return verdict.passed


def rolled_back(client: MlflowClient, version: ModelVersion) -> ModelVersion | None:
    """The version of the same weights that a person took back; None where there is none. The same weights are
    another version where `dvc.lock` changed elsewhere, in a test set for instance."""
    twins = (one for one in versions(client) if one.tags.get(BUNDLE_TAG) == version.tags[BUNDLE_TAG])
    return next((one for one in twins if ROLLED_BACK in one.tags), None)


def rollback(client: MlflowClient) -> tuple[str, str]:
    """Champion and previous change places; returns (the champion's version now, the one before).

    The one that was left is not promoted again by a gate. Raises RegistryError without a previous one.
    """
    finish(client)
    named = aliases(client)
    if CHAMPION not in named or PREVIOUS not in named:
        raise RegistryError("there is no previous champion to go back to; `popen models` lists what there is")
    before, after = named[CHAMPION], named[PREVIOUS]
    _move(client, {CHAMPION: after, PREVIOUS: before, ROLLED_BACK: before})
    return after, before


def _move(client: MlflowClient, to: dict[str, str | None]) -> None:
    client.set_registered_model_tag(NAME, _MOVE, json.dumps(to))
    finish(client)


def finish(client: MlflowClient) -> None:
    """Do what a move's note says; nothing without one. Each step may be done twice."""
    found = client.search_registered_models(f"name = '{NAME}'")
    if not found or _MOVE not in found[0].tags:
        return
    to = json.loads(found[0].tags[_MOVE])
    _point(client, CHAMPION, to[CHAMPION])
    if to[PREVIOUS] is not None:
        _point(client, PREVIOUS, to[PREVIOUS])
    if to.get(ROLLED_BACK):
        client.set_model_version_tag(NAME, to[ROLLED_BACK], ROLLED_BACK, _now())
    if ROLLED_BACK in client.get_model_version(NAME, to[CHAMPION]).tags:
        client.delete_model_version_tag(NAME, to[CHAMPION], ROLLED_BACK)
    if aliases(client).get(CHALLENGER) == to[CHAMPION]:
        client.delete_registered_model_alias(NAME, CHALLENGER)
    client.delete_registered_model_tag(NAME, _MOVE)


def _point(client: MlflowClient, alias: str, number: str) -> None:
    """Set an alias. MLflow fails where two clones make the same one at once; then it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(NAME, alias, number)
    except MlflowException:
        client.set_registered_model_alias(NAME, alias, number)


def _create_model(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(f"name = '{NAME}'"):
        return
    try:
        client.create_registered_model(NAME, description="POPEN: words and masks for questions about images")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another clone was faster
            raise


def _of_lock(client: MlflowClient, lock: str) -> list[ModelVersion]:
    """The versions of this `dvc.lock`, the first one first."""
    return [one for one in versions(client) if one.tags.get(LOCK) == lock]


def _delete(client: MlflowClient, version: ModelVersion) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(NAME, version.version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another clone was faster
            raise


def _commit(root: Path) -> str | None:
    """The commit that is checked out, with "-dirty" (as `git describe --dirty` says) where tracked files
    are not as in it. What a run itself writes does not count: other tags and the files beside the model
    say that."""
    commit = pipeline.git_commit(root)
    words = ["git", "diff", "--quiet", "HEAD", "--", ".", *(f":!{name}" for name in _WRITTEN)]
    if commit is None or subprocess.run(words, cwd=root).returncode == 0:
        return commit
    return f"{commit}-dirty"


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
