"""Free ports, and conditions to wait for."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], patience: float = 600) -> Any:
    """Wait for a condition; what it returned. A server that is too busy to answer it is asked again."""
    deadline = time.monotonic() + patience
    while not (found := _asked(condition)):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


def _asked(condition: Callable[[], Any]) -> Any:
    try:
        return condition()
    except httpx.TimeoutException:
        return None
