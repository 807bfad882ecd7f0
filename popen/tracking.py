"""MLflow records of one stage: a child run below the pipeline's run, shared across processes.

Records are kept in memory and sent in batches (one metric at a time costs 24 ms on SQLite). A tracking
server that is away stops nothing: sending is tried again with growing pauses, and for the last time
when the stage ends. Nor does a run that somebody deleted, whose records are dropped. Files go after
everything else, so that a storage that fails keeps no metric and no run's end waiting. Only MLflow's client
is used, which needs no "active run", so `MLFLOW_RUN_ID` and the like in the environment change nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock

from popen import mlflow_requests, pipeline
from popen.errors import one_line, without_password
from popen.mlflow_requests import (
    end_run,
    faults,
    is_away,
    is_lost,
    is_refusal,
    resumed,
)
from popen.uploads import Task, Tries, Upload, Uploads

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "popen"
_PROCESS = "process"  # tag: the process that ends this run
Status = Literal["FINISHED", "FAILED", "KILLED"]

_BATCH = 900  # metrics a request (MLflow takes 1000 entities)
_EVERY = 10.0  # seconds between two sends of buffered metrics
_LAST_TRIES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # pauses before the tries at the end of a stage, seconds
_PATIENCE = 60.0  # seconds after which the end of a stage tries no more


class Tracker:
    """The MLflow run of one stage.

    `home` is the clone's folder: it holds `mlflow.db`, `mlartifacts/` and `.popen/` unless
    `MLFLOW_TRACKING_URI` names another place. Nothing is raised when the place cannot be reached.
    """

    def __init__(
        self,
        home: Path,
        stage: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: str | None = None,
        last_tries: tuple[float, ...] = _LAST_TRIES,
    ) -> None:
        """`dataset` is the data's hash; it becomes the run's dataset input. Opens the run if it can."""
        quieten()
        self.stage = stage
        self.run_id: str | None = None  # set as soon as the run exists
        self.uri = tracking_uri(home)
        self._home = home
        self._last_tries = last_tries
        self._owned_parent: str | None = None
        self._started = time.time()
        self._client: MlflowClient | None = None
        self._gone = False  # somebody deleted the run
        self._ending = False  # the stage is over
        self._metrics: list[mlflow_requests.Point] = []
        flat = mlflow_requests.flatten(params)
        self._records: list[Task] = [  # what else is a row of the database, in order
            lambda client, run: mlflow_requests.log_params(client, run, flat),
            lambda client, run: mlflow_requests.log_tags(client, run, tags),
        ]
        if dataset is not None:
            data = dataset
            self._records.append(
                lambda client, run: client.log_inputs(run, [mlflow_requests.dataset_input(data)])
            )
        self._tries = Tries()
        self._uploads = Uploads(self._warn)
        self._send()

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Buffer metrics; they are sent every ten seconds or 900 values, and at the end."""
        now = int(time.time() * 1000)
        self._metrics += [
            (mlflow_requests.legal(name), float(value), now, step or 0) for name, value in values.items()
        ]
        if len(self._metrics) >= _BATCH or self._tries.since() > _EVERY:
            self._send_if_due()

    def do(self, task: Task, what: str) -> None:
        """Record something of another kind, which messages call `what`: `task` gets a client and the run's
        id, now or as soon as the server answers. It may be called again where it failed."""
        self._uploads.waiting.append(Upload(what, task))
        self._send_if_due()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run (values of 5000 characters at most)."""
        self._records.append(lambda client, run: mlflow_requests.log_tags(client, run, tags))
        self._send_if_due()

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file or a whole folder with the run (below `folder` of the run's artifacts)."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file to store with the run of stage {self.stage}")
        self.do(lambda client, run: mlflow_requests.log_path(client, run, path, folder), path.name)

    def close(self, status: Status) -> None:
        """Send what is left and end the run. Say what was not recorded, and why."""
        self._ending, deadline = True, time.monotonic() + _PATIENCE
        for pause in (0.0, *self._last_tries):
            time.sleep(pause)
            sent = self._send()
            ended = self._end(status)  # after the uploads, of which that of a model ends the run, too
            if (sent and ended) or time.monotonic() > deadline:
                break
        if self._metrics or self._records or not ended:
            end = "" if ended else " and the run's end"
            self._warn(f"{self._waiting()}{end} were not recorded in MLflow")
        for upload in self._uploads.waiting:
            self._warn(f"{upload.what} was not stored in MLflow ({upload.why})")

    def _end(self, status: Status) -> bool:
        """End the run and the pipeline's, if they are open; returns whether that was possible."""
        if self._client is None or self.run_id is None:
            return False
        try:
            for run in filter(None, (self.run_id, self._owned_parent)):
                end_run(self._client, run, status)
        except faults():
            return False
        return True

    def _warn(self, text: str) -> None:
        print(without_password(f"{self.stage}: warning: {text}"), flush=True)

    def _waiting(self) -> str:
        return f"{len(self._metrics)} metrics and {len(self._records)} other records"

    def _send_if_due(self) -> None:
        if self._tries.is_due():
            self._send()

    def _send(self) -> bool:
        """Try to send everything once; returns whether nothing is left. What was sent is forgotten, so a
        later try goes on from there.

        Raises MlflowException for a wrong name or value, which no second try would mend. The end of a stage
        only says so, for the run must be ended.
        """
        if self._gone:
            self._forget()
        if not self._send_records():
            return False
        client, run = self._open()
        try:
            if self._ending:
                self._uploads.send_last(client, run)
            else:
                self._uploads.send(client, run)
        except faults():
            if not self._was_deleted():
                raise
        return not self._uploads.waiting or self._was_deleted()

    def _send_records(self) -> bool:
        began = time.monotonic()
        try:
            client, run = self._open()
            while self._records:
                self._records[0](client, run)
                self._records.pop(0)
            while self._metrics:
                mlflow_requests.log_points(client, run, self._metrics[:_BATCH])
                del self._metrics[:_BATCH]
        except faults() as error:
            if not is_away(error) and self._was_deleted():
                return True
            if is_refusal(error) and self.run_id is not None:
                # Forget the culprit, or it would be refused again at each later try.
                if self._records:
                    self._records.pop(0)
                else:
                    del self._metrics[:_BATCH]
                if not self._ending:
                    raise
                self._warn(f"MLflow refused a record ({one_line(error)})")
                return self._send_records()
            self._tries.tried(began, failed=True)
            how = "cannot be reached" if is_away(error) else "takes no records"
            waits = f"{self._waiting()} wait and the stage goes on"
            self._warn(f"MLflow at {self.uri} {how} ({one_line(error)}); {waits}")
            return False
        self._tries.tried(began, failed=False)
        return True

    def _was_deleted(self) -> bool:
        """Whether somebody deleted the run; it is not made anew, for they do not want it."""
        if self._client is None or self.run_id is None or not is_lost(self._client, self.run_id):
            return False
        self._warn(f"the run {self.run_id} was deleted in MLflow; its records are dropped, the stage goes on")
        self._gone = True
        self._forget()
        return True

    def _forget(self) -> None:
        self._metrics, self._records, self._uploads.waiting = [], [], []

    def _open(self) -> tuple[MlflowClient, str]:
        """Client and run, made at the first call that reaches the tracking server."""
        if self._client is not None and self.run_id is not None:
            return self._client, self.run_id
        with _connected(self._home, self.uri) as (client, experiment):
            parent = os.environ.get("POPEN_PARENT_RUN") or self._shared_parent(client, experiment)
        run = client.create_run(
            experiment,
            start_time=int(self._started * 1000),
            tags={"mlflow.parentRunId": parent, "stage": self.stage, _PROCESS: pipeline.process_name()},
            run_name=self.stage,
        )
        self._client, self.run_id = client, run.info.run_id
        return client, self.run_id

    def _shared_parent(self, client: MlflowClient, experiment: str) -> str:
        """The run that all stages of one `dvc repro` are children of; call it under the lock."""
        path = pipeline.parent_file(self._home)
        parent = path.read_text(encoding="utf-8") if path.exists() else None
        if parent is None or not resumed(client, parent):
            process = pipeline.process_name(pipeline.dvc_process())
            parent = _create_parent(client, experiment, process)
            path.write_text(parent, encoding="utf-8")
        self._owned_parent = parent
        return parent


class Untracked(Tracker):
    """What stands for the tracker in a process that only helps the main one of its stage."""

    def __init__(self) -> None:
        self.run_id, self.uri = None, ""

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def close(self, status: Status) -> None: ...


def tracking_uri(home: Path) -> str:
    """Where the records go: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the clone."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


def start_parent(home: Path) -> str:
    """Make the run that all stages of one pipeline are children of, for a caller that starts the stages
    one by one and hands them this id in `POPEN_PARENT_RUN`. It is a record of the calling process.

    Raises what MLflow raises when its server is away (MlflowException, SQLAlchemyError, OSError).
    """
    quieten()
    with _connected(home, tracking_uri(home)) as (client, experiment):
        return _create_parent(client, experiment, pipeline.process_name())


def end_parent(home: Path, run_id: str, status: Status) -> None:
    """End the run that `start_parent` made. Raises as that does."""
    with _connected(home, tracking_uri(home)) as (client, _):
        end_run(client, run_id, status)


def runs_below(home: Path, parent: str) -> list[Run]:
    """A parent run and its children, the oldest first. Raises as `start_parent` does."""
    with _connected(home, tracking_uri(home)) as (client, experiment):
        below = f"tags.`mlflow.parentRunId` = '{parent}'"
        children = client.search_runs([experiment], below, order_by=["attributes.start_time ASC"])
        return [client.get_run(parent), *children]


def quieten() -> None:
    """No telemetry, and requests that give up soon; MLflow reads this at each."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.pop("MLFLOW_RUN_ID", None)
    # Our own tries follow each other; MLflow's would hold a stage for minutes each.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


@contextmanager
def _connected(home: Path, uri: str) -> Iterator[tuple[MlflowClient, str]]:
    """Client and experiment id, under a lock: two processes that create the database, the experiment or
    the pipeline's run at once would spoil it."""
    from mlflow.tracking import MlflowClient

    with filelock.FileLock(pipeline.state_folder(home) / "tracking.lock", timeout=_PATIENCE):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            experiment = str(found.experiment_id)
        else:
            experiment = str(client.create_experiment(EXPERIMENT, artifact_location=_artifacts(uri)))
        _end_orphans(client, experiment)
        yield client, experiment


def _artifacts(uri: str) -> str | None:
    """Where a new experiment keeps its files. With SQLite beside the database, wherever that lies, so that
    a copy of the two is a whole one; None leaves it to a server, which has a place of its own."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database).resolve().with_name("mlartifacts").as_uri() if database else None


def _create_parent(client: MlflowClient, experiment: str, process: str) -> str:
    name = time.strftime("pipeline %Y-%m-%d %H:%M:%S")
    tags = {"stage": "pipeline", _PROCESS: process}
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _end_orphans(client: MlflowClient, experiment: str) -> None:
    """Runs whose process was killed outright would be shown as running for good."""
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    for run in running:
        if pipeline.is_gone(run.data.tags.get(_PROCESS, "")):
            end_run(client, run.info.run_id, "KILLED")
