"""MLflow records of one stage: a child run below the pipeline's run, shared across processes.

Records are kept in memory and sent in batches (one metric at a time costs 24 ms on SQLite). A tracking
server that is away stops nothing: sending is tried again with growing pauses, and for the last time
when the stage ends. Only MLflow's client is used, which needs no "active run", so `MLFLOW_RUN_ID` and
the like in the environment change nothing.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock

from popen import pipeline
from popen.errors import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import DatasetInput, Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "popen"
_PROCESS = "process"  # tag: the process that ends this run
Status = Literal["FINISHED", "FAILED", "KILLED"]

_BATCH = 900  # metrics a request (MLflow takes 1000 entities)
_BATCH_PARAMS = 90  # parameters or tags a request (MLflow takes 100)
_EVERY = 10.0  # seconds between two sends of buffered metrics
_LAST_TRIES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # pauses before the tries at the end of a stage, seconds
_PATIENCE = 60.0  # seconds after which the end of a stage tries no more
_LONGEST_PAUSE = 600.0


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
        _quieten()
        self.stage = stage
        self.run_id: str | None = None  # set as soon as the run exists
        self.uri = tracking_uri(home)
        self._home = home
        self._figures = tempfile.TemporaryDirectory(prefix="popen-figures-")  # until they are sent
        self._last_tries = last_tries
        self._owned_parent: str | None = None
        self._started = time.time()
        self._sent_at = time.monotonic()
        self._pause = 0.0  # after a failed try: seconds until the next one
        self._client: MlflowClient | None = None
        self._metrics: list[tuple[str, float, int, int]] = []  # name, value, time in ms, step
        self._tasks: list[Callable[[MlflowClient, str], object]] = [
            lambda client, run: _log_params(client, run, flatten(params)),
            lambda client, run: _log_tags(client, run, tags),
        ]  # everything else that waits, in order
        if dataset is not None:
            self._tasks.append(lambda client, run: client.log_inputs(run, [_dataset_input(dataset)]))
        self._send()

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Buffer metrics; they are sent every ten seconds or 900 values, and at the end."""
        now = int(time.time() * 1000)
        self._metrics += [(legal(name), float(value), now, step or 0) for name, value in values.items()]
        if len(self._metrics) >= _BATCH or time.monotonic() - self._sent_at > _EVERY:
            self._send_if_due()

    def do(self, task: Callable[[MlflowClient, str], object]) -> None:
        """Record something of another kind: `task` gets a client and the run's id, now or as soon as the
        server answers. It may be called again where it failed."""
        self._tasks.append(task)
        self._send_if_due()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tag the run (values of 5000 characters at most)."""
        self.do(lambda client, run: _log_tags(client, run, tags))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file or a whole folder with the run (below `folder` of the run's artifacts)."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file to store with the run of stage {self.stage}")
        self.do(lambda client, run: _log_path(client, run, path, folder))

    def log_figure(self, figure: Figure, name: str) -> None:
        """Store a matplotlib figure as `figures/<name>.png`."""
        path = Path(self._figures.name, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight")
        self.log_artifact(path, str(Path("figures", name).parent))

    def close(self, status: Status) -> None:
        """Send what is left and end the run. Where the server stays away, say what was not recorded."""
        deadline = time.monotonic() + _PATIENCE
        self._tasks.append(lambda client, run: self._end(client, run, status))
        for pause in (0.0, *self._last_tries):
            time.sleep(pause)
            if self._send() or time.monotonic() > deadline:
                break
        if self._tasks or self._metrics:
            print(f"{self.stage}: warning: {self._waiting()} were not recorded in MLflow", flush=True)
        self._figures.cleanup()

    def _end(self, client: MlflowClient, run: str, status: Status) -> None:
        self._send_metrics(client, run)
        client.set_terminated(run, status)
        if self._owned_parent:
            client.set_terminated(self._owned_parent, status)

    def _send_if_due(self) -> None:
        """Send, unless a try failed a short while ago: training must not wait for a dead server."""
        if time.monotonic() - self._sent_at >= self._pause:
            self._send()

    def _send(self) -> bool:
        """Try to send everything once. What was sent is forgotten, so a later try goes on from there.

        Raises MlflowException for a wrong name or value, which no second try would mend.
        """
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        began = time.monotonic()
        try:
            client, run = self._open()
            while self._tasks:
                self._tasks[0](client, run)
                self._tasks.pop(0)
            self._send_metrics(client, run)
            self._pause = 0.0
        except (OSError, MlflowException, SQLAlchemyError) as error:
            if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                # Forget the culprit, or it would be refused again at each later try.
                if self._tasks:
                    self._tasks.pop(0)
                else:
                    del self._metrics[:_BATCH]
                raise
            self._pause = min(max(1.0, 2 * self._pause, 10 * (time.monotonic() - began)), _LONGEST_PAUSE)
            print(
                f"{self.stage}: warning: MLflow at {self.uri} cannot be reached ({one_line(error)}); "
                f"{self._waiting()} wait and the stage goes on",
                flush=True,
            )
        self._sent_at = time.monotonic()
        return self._pause == 0.0

    def _send_metrics(self, client: MlflowClient, run: str) -> None:
        from mlflow.entities import Metric

        while self._metrics:
            client.log_batch(run, metrics=[Metric(*metric) for metric in self._metrics[:_BATCH]])
            del self._metrics[:_BATCH]

    def _waiting(self) -> str:
        return f"{len(self._metrics)} metrics and {len(self._tasks)} other records"

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
        if path.exists():
            parent = path.read_text(encoding="utf-8")
            client.update_run(parent, status="RUNNING")
        else:
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

    def log_figure(self, figure: Figure, name: str) -> None: ...

    def close(self, status: Status) -> None: ...


def tracking_uri(home: Path) -> str:
    """Where the records go: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the clone."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


def start_parent(home: Path) -> str:
    """Make the run that all stages of one pipeline are children of, for a caller that starts the stages
    one by one and hands them this id in `POPEN_PARENT_RUN`. It is a record of the calling process.

    Raises what MLflow raises when its server is away (MlflowException, SQLAlchemyError, OSError).
    """
    _quieten()
    with _connected(home, tracking_uri(home)) as (client, experiment):
        return _create_parent(client, experiment, pipeline.process_name())


def end_parent(home: Path, run_id: str, status: Status) -> None:
    """End the run that `start_parent` made. Raises as that does."""
    with _connected(home, tracking_uri(home)) as (client, _):
        client.set_terminated(run_id, status)


def is_away(error: BaseException) -> bool:
    """Whether an error of MLflow's means that its server or database does not answer, so that a later try
    may help."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
    return isinstance(error, OSError | SQLAlchemyError)


def runs_below(home: Path, parent: str) -> list[Run]:
    """A parent run and its children, the oldest first. Raises as `start_parent` does."""
    with _connected(home, tracking_uri(home)) as (client, experiment):
        below = f"tags.`mlflow.parentRunId` = '{parent}'"
        children = client.search_runs([experiment], below, order_by=["attributes.start_time ASC"])
        return [client.get_run(parent), *children]


def _quieten() -> None:
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
            local = "MLFLOW_TRACKING_URI" not in os.environ
            location = (home / "mlartifacts").as_uri() if local else None
            experiment = str(client.create_experiment(EXPERIMENT, artifact_location=location))
        _end_orphans(client, experiment)
        yield client, experiment


def _create_parent(client: MlflowClient, experiment: str, process: str) -> str:
    name = time.strftime("pipeline %Y-%m-%d %H:%M:%S")
    tags = {"stage": "pipeline", _PROCESS: process}
    return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _end_orphans(client: MlflowClient, experiment: str) -> None:
    """Runs whose process was killed outright would be shown as running for good."""
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    for run in running:
        if pipeline.is_gone(run.data.tags.get(_PROCESS, "")):
            client.set_terminated(run.info.run_id, "KILLED")


def _log_params(client: MlflowClient, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(entities), _BATCH_PARAMS):
        client.log_batch(run, params=entities[start : start + _BATCH_PARAMS])


def _log_tags(client: MlflowClient, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    entities = [RunTag(name, value[:5000]) for name, value in tags.items()]
    for start in range(0, len(entities), _BATCH_PARAMS):
        client.log_batch(run, tags=entities[start : start + _BATCH_PARAMS])


def _log_path(client: MlflowClient, run: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run, str(path), str(Path(folder or "", path.name)))
    else:
        client.log_artifact(run, str(path), folder)


def _dataset_input(digest: str) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": "data", "dvc": "data.dvc"})
    data = Dataset(name="data", digest=digest[:36], source_type="local", source=source)
    return DatasetInput(data, [InputTag("mlflow.data.context", "pipeline")])
