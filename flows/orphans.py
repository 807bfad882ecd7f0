"""Flow runs whose process was killed outright stay RUNNING on the server for good: find and close them.

Each flow run leaves a file `.popen/flow-<id>` with its process while it lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas import State
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from popen.pipeline import is_gone, process_name, state_folder


@contextmanager
def recorded(home: Path, flow_run_id: str) -> Iterator[None]:
    """Note the process of this flow run for as long as the body takes; close dead runs first."""
    close(home)
    path = state_folder(home) / f"flow-{UUID(flow_run_id)}"
    path.write_text(process_name(), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def close(home: Path) -> list[str]:
    """End the flow runs of this clone whose process is gone, as crashed. Returns their ids."""
    dead = [path for path in state_folder(home).glob("flow-*") if is_gone(path.read_text(encoding="utf-8"))]
    if not dead:
        return []
    closed = []
    with get_client(sync_client=True) as client:
        for path in dead:
            name = path.name.removeprefix("flow-")
            try:
                state = client.read_flow_run(UUID(name)).state
            except ObjectNotFound:  # it was a run of another server
                state = None
            if state is not None and not state.is_final():
                message = "Its process was killed. Start it again: finished stages are not repeated."
                crashed = State(type=StateType.CRASHED, name="Crashed", message=message)
                client.set_flow_run_state(UUID(name), crashed, force=True)
                closed.append(name)
            path.unlink(missing_ok=True)
    return closed
