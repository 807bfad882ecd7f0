"""Flow runs of a machine that died: the server closes a run of which it has heard nothing for a while.

    python -m flows.heartbeats

Prefect's own way for a server of one's own (its guide "How to detect and respond to zombie flows"): a run at
work sends a heartbeat every three minutes, and an automation of the server waits for the next one. `make up`
makes it, too. The dead runs of this clone need no waiting: flows/orphans.py.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from prefect.automations import (
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL

NAME = "close silent flow runs"
SILENCE = timedelta(minutes=9)  # three heartbeats at Prefect's 180 s
_EVENTS = "prefect.flow-run."
# A run that a worker has taken, or that is to stop, sends none until its process begins, or none any more.
_ALIVE = ("heartbeat", "Pending", "Submitting", "InfrastructurePending", "Running", "Cancelling")


def watch(silence: timedelta = SILENCE) -> None:
    """Make the automation on the server, or bring the one that is there up to date.

    A run that ended is not touched; one that was only cut off goes on and says how it ended.
    """
    trigger = EventTrigger(
        after={_EVENTS + name for name in _ALIVE},
        expect={_EVENTS + "*"},
        match=ResourceSpecification({"prefect.resource.id": [_EVENTS + "*"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )
    message = (
        f"Nothing was heard of it for {silence.total_seconds():g} s: its machine, its process or the network "
        "is gone. Start it again: finished stages are not repeated."
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)
    automation = AutomationCore(name=NAME, description=__doc__ or "", trigger=trigger, actions=[action])
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(NAME)
        if found:
            client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)


def main() -> None:
    if PREFECT_API_URL.value() is None:
        sys.exit("error: no server is named: set PREFECT_API_URL, or `make up`")
    watch()
    print(f"automation: {NAME}, after {SILENCE.total_seconds() / 60:g} minutes")


if __name__ == "__main__":
    main()
