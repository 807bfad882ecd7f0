"""New data, or time, makes a new model; it becomes the champion if the gate lets it pass.

python -m flows.retraining [--force] [--max-age-days DAYS]
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import filelock
from mlflow.entities.model_registry import ModelVersion
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.runtime import flow_run
from prefect.states import State
from prefect.tasks import RetryConditionCallable

from flows import dvc_graph, orphans, parent_run
from flows.by_hand import by_hand
from flows.pipeline import PAUSES, PipelineError, popen_pipeline, remote_failed
from flows.stage_process import run_dvc
from popen import params as parameters
from popen import pipeline, tracking
from popen.promotion import challenge, opponent, registry
from popen.stages.artifacts import CONTRACT
from popen.stages.run import quiet

MONTH = 30.0
REPORT = CONTRACT / "report.json"
SHOWN = 10  # broken rules that the page lists


class RetrainError(RuntimeError):
    """No new model was made; the message says why and what to do."""


@flow(name="retrain", persist_result=False)
def retrain(
    force: bool = False,
    max_age_days: float | None = MONTH,
    share: bool = False,
    stage_timeout: float | None = None,
) -> str:
    """Make and judge a new model where the data is not the champion's or the champion is old.

    force: also where neither holds, and every stage anew. max_age_days: None for a champion that may grow
    as old as it likes. What has not changed since, DVC does not compute again, whatever the reason.
    share, stage_timeout: as those of `popen_pipeline`.

    Returns what became of it (Markdown). Raises RetrainError for data that breaks its contract and while
    another `retrain` is at work in this clone, PipelineError for a stage that failed.
    """
    root = pipeline.find_root(Path.cwd())
    quiet()
    orphans.record(root, str(flow_run.id))
    with _alone(pipeline.find_home(root)):
        opponent.check_gate(parameters.load(root / "params.yaml"))  # before hours are spent
        words = _retrain(root, force, max_age_days, share, stage_timeout)
    create_markdown_artifact(words, key="retrain", description="What became of this run, and why")
    return words


def _retrain(
    root: Path, force: bool, max_age_days: float | None, share: bool, stage_timeout: float | None
) -> str:
    update_data(root)
    home = pipeline.find_home(root)
    reason = due(champion(home), pipeline.data_hash(root), force, max_age_days, time.time())
    if reason is None:
        return "Nothing to do: the data is the champion's, and the champion is young enough."
    get_run_logger().info("A new model is made: %s", reason)
    validate(root, share, stage_timeout)
    run_stages(None, force, share, stage_timeout)
    check_up_to_date(root)
    outcome = register_and_judge(root, home, reason)
    get_run_logger().info(outcome.words)
    return f"{outcome.words}\n\nMade because {reason}."


def run_stages(targets: list[str] | None, force: bool, share: bool, stage_timeout: float | None) -> None:
    """Bring stages up to date. Raises PipelineError."""
    popen_pipeline(targets=targets, force=force, share=share, stage_timeout=stage_timeout)


def check_up_to_date(root: Path) -> None:
    """Raises RetrainError where something was changed while the stages ran: a version's lineage would name
    what it was not made of. New data at the source is the next run's."""
    stale = [stage.name for stage in dvc_graph.read(root) if stage.changed and stage.name != "data.dvc"]
    if stale:
        more = f" and {len(stale) - SHOWN} more" if len(stale) > SHOWN else ""
        raise RetrainError(
            "something that the stages depend on was changed while they ran, and nothing was registered: "
            f"{', '.join(stale[:SHOWN])}{more} would run again. Start it again"
        )


@task(
    name="dvc update",
    task_run_name="dvc update",
    cache_policy=NO_CACHE,
    retries=len(PAUSES),
    retry_delay_seconds=PAUSES,
    retry_condition_fn=remote_failed,
)
def update_data(root: Path) -> None:
    """Take over what is new at the data's source. Raises StageError with DVC's last lines."""
    run_dvc(root, ["update", "data.dvc"], "dvc update", get_run_logger().info, stop=threading.Event())


def due(
    serving: ModelVersion | None, data: str | None, force: bool, max_age_days: float | None, now: float
) -> str | None:
    """Why a new model is due, in words; None where none is. `serving` is the champion, `data` the hash of
    data/, `now` in seconds.

    The data is compared with the champion's and not with yesterday's, so that a run that broke off is
    taken up again.
    """
    if force:
        return "it was asked for (force)"
    if serving is None:
        return "there is no champion yet"
    if serving.tags.get("data") != data:
        return f"the data is not that of the champion (version {serving.version})"
    days = (now - serving.creation_timestamp / 1000) / 86400
    if max_age_days is not None and days > max_age_days:
        return f"the champion (version {serving.version}) is {days:.1f} days old, {max_age_days:g} allowed"
    return None


def validate(root: Path, share: bool, stage_timeout: float | None) -> None:
    """Check the new data before anything is trained. Raises RetrainError with the contract's report."""
    try:
        run_stages(["validate"], False, share, stage_timeout)
    except PipelineError:
        words = broken_contract(root)
        if words is None:
            raise
        create_markdown_artifact(words, key="contract", description="The data breaks its contract")
        raise RetrainError(words) from None


def broken_contract(root: Path) -> str | None:
    """The report of a broken contract in Markdown: where it is and the first rules; None without one.

    DVC removes a stage's outputs before it runs, so a report that is there is that of the last run.
    """
    if not (root / REPORT).is_file():
        return None
    report = json.loads((root / REPORT).read_text(encoding="utf-8"))
    if report["accepted"]:
        return None
    rules = report["failures"] + [
        f"{item['file']}, record {item['record']}: {item['rule']}" for item in report["quarantine"]
    ]
    more = [f"and {len(rules) - SHOWN} more"] if len(rules) > SHOWN else []
    lead = (
        "the new data breaks its contract, nothing was trained and the champion stays; correct the data's "
        f"source and start again. Report: {root / REPORT.with_suffix('.html')}"
    )
    return "\n".join([lead, "", *(f"- {rule}" for rule in [*rules[:SHOWN], *more])])


def mlflow_away(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry can help: MLflow did not answer."""
    try:
        state.result()
    except registry.AwayError:
        return True
    except Exception as error:
        return tracking.is_away(error)
    return False


class _Patient(TypedDict):
    cache_policy: CachePolicy
    retries: int
    retry_delay_seconds: list[float]
    retry_condition_fn: RetryConditionCallable


# of the tasks that ask MLflow
_PATIENT: _Patient = {
    "cache_policy": NO_CACHE,
    "retries": len(parent_run.PAUSES),
    "retry_delay_seconds": parent_run.PAUSES,
    "retry_condition_fn": mlflow_away,
}


@task(name="champion", task_run_name="champion", **_PATIENT)
def champion(home: Path) -> ModelVersion | None:
    """Who serves now."""
    try:
        client = registry.connect(home)
    except registry.NoRegistryError:
        return None
    registry.finish(client)  # a promotion that was killed between its steps
    return registry.version(client, registry.CHAMPION)


@task(name="challenge", task_run_name="challenge", **_PATIENT)
def register_and_judge(root: Path, home: Path, reason: str) -> challenge.Outcome:
    """Register the results and promote them if they are better; whatever was done before is found again."""
    return challenge.challenge(root, home, reason)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """The operating system frees the lock of a process that is killed."""
    lock = filelock.FileLock(pipeline.state_folder(home) / "retrain.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RetrainError(
            f"another `retrain` is at work in this clone ({lock.lock_file} is held); wait until it has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.retraining", description="Train and judge a new model where one is due"
    )
    parser.add_argument("--force", action="store_true", help="also where none is due, and every stage anew")
    parser.add_argument(
        "--max-age-days", type=float, default=MONTH, help="oldest champion (default: %(default)s)"
    )
    words = parser.parse_args()

    def run() -> str:  # an error of the flow itself comes with Prefect's stack traces
        opponent.check_gate(parameters.load(Path("params.yaml")))
        return retrain(force=words.force, max_age_days=words.max_age_days)

    print(by_hand(run))


if __name__ == "__main__":
    main()
