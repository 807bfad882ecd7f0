"""Files and models that wait for their storage, which may fail where MLflow's database works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from popen.errors import one_line
from popen.mlflow_requests import is_refusal

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Task = Callable[["MlflowClient", str], object]  # gets a client and the run's id

_LONGEST_PAUSE = 600.0
_LOST = 20.0  # seconds that failures may cost a last try


class Tries:
    """When to try again: training must not wait for what does not answer, so the pauses grow."""

    def __init__(self) -> None:
        self._last, self._pause = time.monotonic(), 0.0

    def since(self) -> float:
        """Seconds since the last one ended."""
        return time.monotonic() - self._last

    def is_due(self) -> bool:
        return self.since() >= self._pause

    def tried(self, began: float, failed: bool) -> None:
        self._last = time.monotonic()
        longer = max(1.0, 2 * self._pause, 10 * (self._last - began))
        self._pause = min(longer, _LONGEST_PAUSE) if failed else 0.0


@dataclass
class Upload:
    what: str
    task: Task
    why: str = "MLflow did not answer in time"  # it is not stored


class Uploads:
    """`waiting` are those that are not stored yet."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.waiting: list[Upload] = []
        self._warn = warn
        self._tries = Tries()

    def send(self, client: MlflowClient, run: str) -> None:
        """Try what waits, unless a try failed a short while ago. The first failure ends the try, and the
        next one begins with another upload.

        Raises MlflowException for a wrong name or value, which no second try would mend.
        """
        while self.waiting and self._tries.is_due():
            upload, began = self.waiting[0], time.monotonic()
            error = _failure(upload, client, run)
            self.waiting.remove(upload)
            if error is not None and is_refusal(error):
                raise error
            if error is not None:
                self.waiting.append(upload)
                self._warn(f"{upload.what} cannot be stored in MLflow yet ({upload.why})")
            self._tries.tried(began, failed=error is not None)

    def send_last(self, client: MlflowClient, run: str) -> None:
        """Try each that waits, also after a failure, until failures have cost too much time."""
        lost = 0.0
        for upload in list(self.waiting):
            began = time.monotonic()
            if _failure(upload, client, run) is None:
                self.waiting.remove(upload)
            else:
                lost += time.monotonic() - began
            if lost > _LOST:
                break


def _failure(upload: Upload, client: MlflowClient, run: str) -> Exception | None:
    try:
        upload.task(client, run)
    except Exception as error:  # each storage has a library with errors of its own
        upload.why = one_line(error)
        return error
    return None
