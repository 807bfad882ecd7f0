"""A flow that somebody starts at a terminal, without a server of Prefect's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def by_hand(flow: Callable[[], T], *expected: type[Exception]) -> T:
    """Run it; an error of the `expected` kinds ends the process with one line and code 1.

    Where no server is named, Prefect starts one for the run, and that server reports its end as an error, in
    pages of stack traces: it is told to be silent. What of its errors matters, the flow meets too.
    """
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    try:
        return flow()
    except expected as error:
        sys.exit(f"error: {error}")
