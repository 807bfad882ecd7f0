"""The MLflow run that the stages of one flow run are children of."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popen import tracking
from popen.errors import one_line

PAUSES = [2.0, 4.0, 8.0, 16.0]  # seconds before the tries while the tracking server is away


class ParentRun:
    """Made when the first stage needs a process: a run in which nothing changed leaves no empty record."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()  # stages start side by side
        self._tried = False
        self.id: str | None = None

    def environment(self) -> dict[str, str]:
        """The variable that tells a stage its parent; empty where MLflow stays away, which stops no
        training: each stage then records under a parent of its own as soon as it can."""
        with self._lock:
            if not self._tried:
                self._tried = True
                try:
                    self.id = start_parent(self._home)
                except Exception as error:
                    get_run_logger().warning("MLflow is away, the stages share no run: %s", one_line(error))
        return {"POPEN_PARENT_RUN": self.id} if self.id else {}

    def end(self, status: tracking.Status) -> None:
        """End the run if there is one. Where MLflow stays away, a later pipeline closes it."""
        pauses = [] if status == "KILLED" else list(PAUSES)  # who cancels does not wait
        while self.id:
            try:
                tracking.end_parent(self._home, self.id, status)
                break
            except Exception as error:
                if not pauses:
                    get_run_logger().warning("MLflow is away, its run is not ended: %s", one_line(error))
                    break
            time.sleep(pauses.pop(0))


@task(
    name="mlflow run",
    task_run_name="mlflow run",
    cache_policy=NO_CACHE,
    retries=len(PAUSES),
    retry_delay_seconds=PAUSES,
)
def start_parent(home: Path) -> str:
    return tracking.start_parent(home)
