"""The pipeline as a Prefect flow: one task a stage, edges as in DVC.

python -m flows.pipeline [TARGET ...] [-S key=value ...] [--force]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Completed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import lock_file, orphans, run_page
from flows.by_hand import by_hand
from flows.dvc_graph import Stage, read, unaccompanied
from flows.parent_run import ParentRun
from flows.stage_process import FREE_SPACE, Outcome, StageError, reproduce, run_dvc
from popen import tracking
from popen.errors import one_line
from popen.pipeline import find_root

PAUSES = [5.0, 20.0, 60.0]  # seconds before the tries after a failure of remote storage


class PipelineError(RuntimeError):
    """Stages of the pipeline failed."""


@dataclass
class _Work:
    """What the stages of one flow run share."""

    root: Path
    force: bool
    share: bool
    timeout: float | None
    slots: threading.Semaphore  # stages at once
    threads: int  # of each of them
    parent: ParentRun
    stop: threading.Event = field(default_factory=threading.Event)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


@flow(
    name="pipeline",
    # a thread waits for each stage's turn; how many stages run at once, `slots` says
    task_runner=cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner()),
    persist_result=False,
)
def popen_pipeline(
    targets: list[str] | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
    at_once: int = 2,
    stage_timeout: float | None = None,
    share: bool = False,
) -> dict[str, str]:
    """Bring the pipeline up to date, as `dvc repro` does.

    targets: stages (with what they need); all by default. overrides: parameters as `dvc exp run -S` takes
    them: the run becomes a DVC experiment, and the workspace stays as it is. force: run stages that did
    not change, too. at_once: how many stages run side by side; they share the machine's cores, and a stage
    beside which none can run has all. stage_timeout: seconds that one stage may take. share: fetch from the
    DVC remote what others have computed, and give what this run computes.

    Returns what became of each stage ("ran", "restored", "cached"), or {"experiment": its name}. Raises
    PipelineError naming the stages that failed, after those that do not depend on them have ended.
    """
    root = find_root(Path.cwd())
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    work = _Work(root, force, share, stage_timeout, threading.Semaphore(at_once), threads, ParentRun(root))
    status: tracking.Status = "KILLED"
    experiment = f"flow-{str(flow_run.id)[:8]}" if overrides else None
    orphans.record(root, str(flow_run.id))
    try:
        if share:
            _storage("pull", work)
        try:
            if experiment:
                _experiment(experiment, targets or [], overrides or [], work)
            else:
                _stages(targets, work)
        except Exception:
            status = "FAILED"
            if share:  # what was finished before a failure is worth sharing, too
                _push_after_failure(work)
            raise
        status = "FINISHED"
        if share:
            _storage("push", work)
    finally:
        work.stop.set()  # on every way out, so that no stage survives its flow
        work.parent.end(status)
        if status != "KILLED":
            _publish(work, experiment, status)
    return {"experiment": experiment} if experiment else {k: str(v) for k, v in work.outcomes.items()}


def _publish(work: _Work, experiment: str | None, status: tracking.Status) -> None:
    try:
        if work.parent.id:
            run_page.publish_links(work.root, work.parent.id)
        # without `report`, or after a failure, the files hold the results of an earlier run
        if status == "FINISHED" and (experiment or "report" in work.outcomes):
            run_page.publish_results(work.root, experiment)
    except Exception as error:  # a page that lacks its table must not fail a training
        get_run_logger().warning("The artifacts of this run were not made: %s", one_line(error))


def _stages(targets: list[str] | None, work: _Work) -> None:
    lock_file.settle(work.root)
    futures: dict[str, PrefectFuture[Any]] = {}
    stages = read(work.root, targets)
    alone = unaccompanied(stages)
    for stage in stages:
        needed = [futures[name] for name in stage.needs]
        futures[stage.name] = _stage_task(stage, work, stage.name in alone).submit(wait_for=needed)
    wait(list(futures.values()))
    bad = {name: future.state for name, future in futures.items() if not future.state.is_completed()}
    if bad:
        failed = [name for name, state in bad.items() if state.is_failed() or state.is_crashed()]
        skipped = [name for name in bad if name not in failed]
        after = f"; not run, because they need them: {', '.join(skipped)}" if skipped else ""
        full = ""
        if any(getattr(bad[name].result(raise_on_failure=False), "full", False) for name in failed):
            full = f". {FREE_SPACE.capitalize()}"
            with contextlib.suppress(OSError):  # the next run does it, where there is no room now
                lock_file.settle(work.root)
        raise PipelineError(
            f"failed: {', '.join(failed)}{after}{full}. The log of each task has its last lines"
        )


def _stage_task(stage: Stage, work: _Work, alone: bool) -> Any:
    @task(
        name=stage.name,
        task_run_name=stage.name,
        cache_policy=NO_CACHE,  # what may be skipped, DVC knows
        retries=len(PAUSES),
        retry_delay_seconds=PAUSES,
        retry_condition_fn=remote_failed,
    )
    def run() -> State[Any] | str:
        before = {work.outcomes[name] for name in stage.needs}
        if not (work.force or stage.changed or before - {Outcome.CACHED}):
            # as DVC found when it read the graph: a process that says so again would take half a second
            work.outcomes[stage.name] = Outcome.CACHED
            return _skipped(Outcome.CACHED)
        log = get_run_logger()
        environment = work.parent.environment()
        if not alone and "OMP_NUM_THREADS" not in os.environ:
            # stages with a thread for every core each wait for each other's, and take many times as long
            environment["OMP_NUM_THREADS"] = str(work.threads)
        with work.slots:
            outcome = reproduce(
                work.root,
                stage.name,
                log.info,
                stop=work.stop,
                force=work.force,
                pull=work.share,
                timeout=work.timeout,
                environment=environment,
            )
        work.outcomes[stage.name] = outcome
        return str(outcome) if outcome is Outcome.RAN else _skipped(outcome)

    return run


def _skipped(outcome: Outcome) -> State[Any]:
    """The state of a stage that had nothing to compute, as the run's page shows it."""
    words = {Outcome.CACHED: "nothing changed", Outcome.RESTORED: "its outputs came from DVC's run cache"}
    return Completed(name=outcome.capitalize(), message=words[outcome])


def remote_failed(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry can help: remote storage was away. A stage whose command failed would fail again."""
    try:
        state.result()
    except StageError as error:
        return error.retry
    except BaseException:
        return False
    return False


def _experiment(name: str, targets: list[str], overrides: list[str], work: _Work) -> None:
    """`dvc exp run` in a temporary workspace, as one task. Raises GraphError for an unknown target."""
    read(work.root, targets)  # so that no target is taken for an option

    @task(name="experiment", task_run_name=name, cache_policy=NO_CACHE)
    def run() -> None:
        words = ["exp", "run", "--temp", *(["--force"] if work.force else [])]
        words += [word for override in overrides for word in ("-S", override)]
        words += ["--name", name, *targets]
        run_dvc(
            work.root,
            words,
            "experiment",
            get_run_logger().info,
            stop=work.stop,
            timeout=work.timeout,
            environment=work.parent.environment() | _identity(work.root),
        )

    run.submit().result()


def _identity(root: Path) -> dict[str, str]:
    """Variables that name a committer, where git knows none: DVC keeps an experiment as a commit."""
    if subprocess.run(["git", "config", "user.email"], cwd=root, capture_output=True).returncode == 0:
        return {}
    values = {"NAME": "popen", "EMAIL": "popen@localhost"}
    named = {f"GIT_{who}_{k}": v for who in ("AUTHOR", "COMMITTER") for k, v in values.items()}
    return {name: os.environ.get(name, value) for name, value in named.items()}


def _storage(direction: str, work: _Work) -> None:
    """`dvc pull` or `dvc push`, with the run cache, as a task with retries."""

    @task(
        name=direction,
        task_run_name=direction,
        cache_policy=NO_CACHE,
        retries=len(PAUSES),
        retry_delay_seconds=PAUSES,
        retry_condition_fn=remote_failed,
    )
    def run() -> None:
        # what nobody has computed yet is missing from the remote, which is no fault
        words = [direction, "--run-cache", *(["--allow-missing"] if direction == "pull" else [])]
        run_dvc(work.root, words, f"dvc {direction}", get_run_logger().info, stop=work.stop)

    run.submit().result()


def _push_after_failure(work: _Work) -> None:
    try:
        _storage("push", work)
    except Exception as error:  # the run tells what failed first
        get_run_logger().error("What was finished could not be shared: %s", one_line(error))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description="The pipeline, run by Prefect"
    )
    parser.add_argument("targets", nargs="*", help="stages, with what they need (all by default)")
    parser.add_argument("-S", "--set-param", action="append", dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="also run stages that did not change")
    words = parser.parse_args()

    def run() -> None:
        if words.targets:  # an error of the flow itself comes with Prefect's stack traces
            read(Path.cwd(), words.targets)
        popen_pipeline(targets=words.targets or None, overrides=words.overrides, force=words.force)

    by_hand(run)


if __name__ == "__main__":
    main()
