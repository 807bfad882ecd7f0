"""Flow runs whose process was killed outright stay as they were on the server for good: find and close them.

Each flow run leaves a file `.popen/flow-<id>` with its process. It is taken off when the process is gone and
the server knows how the run ended, so a run that could not tell its end is found, too.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from popen.pipeline import is_gone, process_name, state_folder

_WORKER = "prefect.worker.name"  # label that a worker gives to a run that it has taken


def record(home: Path, flow_run_id: str) -> None:
    """Note that this process is that of a flow run; close dead runs first."""
    close(home)
    (state_folder(home) / f"flow-{UUID(flow_run_id)}").write_text(process_name(), encoding="utf-8")


def close(home: Path) -> list[str]:
    """End the flow runs of this clone whose process is gone, as crashed. Returns their ids."""
    dead = [path for path in _notes(home) if is_gone(path.read_text(encoding="utf-8"))]
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
                _crash(client, UUID(name))
                closed.append(name)
            path.unlink(missing_ok=True)
    return closed


def close_taken(home: Path, pool: str, worker: str) -> list[str]:
    """End the runs that a worker which is dead had taken and whose process never began. Returns their ids.

    A run without a worker's name was taken a moment before the worker died. (Should its process live after
    all, it goes on and says so: Prefect lets a crashed run become a running one.)
    """
    begun = {path.name.removeprefix("flow-") for path in _notes(home)}
    states = [StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": states}}}),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
        )
        taken = [run.id for run in found if run.labels.get(_WORKER) in (None, worker)]
        lost = [run for run in taken if str(run) not in begun]
        for run in lost:
            _crash(client, run)
    return [str(run) for run in lost]


def _notes(home: Path) -> list[Path]:
    return list(state_folder(home).glob("flow-*"))


def _crash(client: SyncPrefectClient, run: UUID) -> None:
    message = "Its process was killed. Start it again: finished stages are not repeated."
    crashed = State(type=StateType.CRASHED, name="Crashed", message=message)
    client.set_flow_run_state(run, crashed, force=True)
