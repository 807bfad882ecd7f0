"""What every stage needs around its work: parameters, quiet libraries, an MLflow run, clear errors.

    with stage("sft") as run:
        from popen.model.segmenter import Segmenter  # heavy imports go inside, see `stage`
        ...
        run.log_metrics({"loss": loss}, step)

Only the standard library and light modules are imported here: a pipeline starts this 52 times.
"""

from __future__ import annotations

import csv
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from popen import devices, pipeline
from popen import params as parameters
from popen.errors import explain
from popen.orphans import end_with
from popen.tracking import Status, Tracker, Untracked

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "ACCELERATE_LOG_LEVEL": "ERROR",  # else a line a checkpoint about tied weights
    "MPLBACKEND": "Agg",
}

PATIENCE = 5.0  # seconds until a process that helps says itself what went wrong

Handler = Callable[[int, FrameType | None], Any] | int | None  # of a signal


def quiet() -> None:
    """Spare the user the libraries' chatter and telemetry. They read this when they are imported."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # peft asks transformers by an old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no `except Exception` of a library swallows it."""


class Run:
    """One stage at work.

    `root` is where the stage's files are (in `dvc exp run --temp` a temporary workspace), `home` the
    clone, which holds what outlives a workspace: checkpoints and MLflow's records.
    """

    def __init__(self, name: str, root: Path, home: Path, params: parameters.Params) -> None:
        self.name = name
        self.root = root
        self.home = home
        self.params = params
        self.main = devices.is_main()  # else a process that helps: it writes no files and no records
        self._points: dict[tuple[int, str], float] = {}
        commit, lock, data = pipeline.git_commit(root), pipeline.lock_digest(root), pipeline.data_hash(root)
        tags = {"mlflow.source.git.commit": commit, "dvc.lock": lock, "data": data}
        told = {key: tag for key, tag in tags.items() if tag}
        self.tracker = (
            Tracker(home, name, params.model_dump(mode="json"), told, data) if self.main else Untracked()
        )

    def say(self, text: str) -> None:
        """One line of progress."""
        if self.main:
            print(f"{self.name}: {text}", flush=True)

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics, with a step those of a curve. The same name and step again replaces the
        point of the curve, so a resumed stage may record its past again."""
        self.tracker.log_metrics(values, step)
        if step is not None:
            self._points |= {(step, name): float(value) for name, value in values.items()}

    def curves(self, path: Path) -> None:
        """Write every point so far as CSV: step, name, value, sorted. Call it when the work is done."""
        if not self.main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, value] for (step, name), value in sorted(self._points.items()))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file or folder with the MLflow run."""
        self.tracker.log_artifact(path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tracker.set_tags(tags)


@contextmanager
def stage(
    name: str, shared: bool = False, usual: Callable[[parameters.Params], int] = lambda params: 1
) -> Iterator[Run]:
    """Run the body as the stage `name`: in the DVC root, with parameters and an MLflow child run.

    `shared` lets it be several processes (`popen.devices`), `usual` of them where nobody asks for a number;
    the body then runs in each of them.

    Import transformers, peft, open_clip and Great Expectations inside the body: they read the
    environment that is set here (offline unless the parameters name a model of the hub) when they are
    imported. Errors of this package's own types and a full disk are printed as one line and end the
    process with code 1 (`POPEN_DEBUG=1` shows the stack trace); SIGTERM ends it with 143.
    """
    began = time.monotonic()
    run: Run | None = None
    status: Status = "FAILED"
    before = Path.cwd()
    handler: Handler = None
    collector = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)  # imports make no garbage: looking for it takes a second a stage
    try:
        handler = _catch_signals()
        if not shared and devices.count() > 1:
            raise devices.DevicesError(f"{name} runs on one device; start it as one process")
        root = pipeline.find_root(before)
        os.chdir(root)
        quiet()
        params = parameters.load(root / "params.yaml")
        if shared:
            devices.relaunch(lambda: usual(params))
        if not needs_hub(params):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        run = Run(name, root, pipeline.find_home(root), params)
        run.say("started")
        yield run
        status = "FINISHED"
    except (Terminated, KeyboardInterrupt) as error:
        status = "KILLED"
        if devices.is_main():
            print(f"{name}: stopped by a signal", file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 143) from None
    except Exception as error:
        text = explain(error)
        _let_the_main_process_speak()
        if run is not None:
            run.set_tags({"error": (text or f"{type(error).__name__}: {error}").strip().splitlines()[-1]})
        if text is None or os.environ.get("POPEN_DEBUG"):
            raise
        print(f"{name}: error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        if run is not None:
            run.tracker.close(status)
            run.say(f"{status.lower()} after {time.monotonic() - began:.1f} s")
        if status == "FINISHED":
            devices.leave()
        os.chdir(before)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        gc.set_threshold(*collector)
        gc.freeze()  # nor need the interpreter search all modules for garbage before it exits


def _let_the_main_process_speak() -> None:
    """What all processes fail of is said once: those that help wait for the main one's end, and theirs."""
    try:
        time.sleep(0 if devices.is_main() else PATIENCE)
    except Terminated:
        raise SystemExit(143) from None


def needs_hub(params: parameters.Params) -> bool:
    """Whether the parameters name weights that are neither ours nor a file or folder on this disk."""
    language, vision = params.model.language, params.model.vision
    return (language.name != "custom" and not Path(language.name).exists()) or (
        vision.pretrained != "" and not Path(vision.pretrained).exists()
    )


def _catch_signals() -> Handler:
    """SIGTERM becomes an exception, and the death of the `dvc` above becomes SIGTERM, for a killed
    `dvc` would leave the stage running beside the next one; so does that of the torchrun above, which ends
    the others when one of its processes has failed. Only the main thread can do this."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler: Handler = signal.signal(signal.SIGTERM, _terminate)
    waited_for = devices.count() > 1 or pipeline.dvc_process() is not None
    if waited_for and not end_with(os.getppid(), signal.SIGTERM):
        raise Terminated
    return handler


def _terminate(number: int, frame: FrameType | None) -> None:
    # whoever ends a group of processes signals this one twice: itself, and by the end of `dvc` above
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
