"""A flow that somebody starts at a terminal, without a server of Prefect's."""

from __future__ import annotations

import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx

from popen.errors import explain
from popen.pipeline import find_root

T = TypeVar("T")


def spare_loopback() -> None:
    """No request to this machine goes through a proxy, whatever `HTTP_PROXY` says (for children, too)."""
    names = ("NO_PROXY", "no_proxy")
    hosts = [host for name in names for host in os.environ.get(name, "").split(",") if host]
    # in both, for of two that are there clients read one alone
    spared = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
    os.environ.update(dict.fromkeys(names, spared))


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception would. Where they end it outright, the server that
    Prefect has started for the run goes on for ever."""
    untouched = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in untouched:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in untouched:
            signal.signal(number, signal.SIG_DFL)


class ServerGoneError(RuntimeError):
    """The server that `make up` started for this clone does not answer; the message says what to do."""


def _find_server(root: Path) -> None:
    """Raises ServerGoneError: Prefect would tell it in pages of stack traces, after a minute."""
    settings = root / "prefect.toml"
    if "PREFECT_API_URL" in os.environ or not settings.is_file():
        return
    url = tomllib.loads(settings.read_text(encoding="utf-8")).get("api", {}).get("url")
    try:
        if url:
            httpx.get(f"{url}/health", timeout=10)
    except httpx.HTTPError:
        raise ServerGoneError(
            f"Prefect's server of this clone ({url}, named in {settings}) does not answer: `make up` starts "
            "it again, after `make down` the flow runs without one"
        ) from None


def by_hand(flow: Callable[[], T]) -> T:
    """Run it in the folder of the clone; an error that is written to be read ends the process with one line
    and code 1 (`POPEN_DEBUG=1` shows the stack trace).

    Where no server is named, Prefect starts one for the run, and that server reports its end as an error, in
    pages of stack traces: it is told to be silent. What of its errors matters, the flow meets too.
    """
    spare_loopback()
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    try:
        os.chdir(find_root(Path.cwd()))
        _find_server(Path.cwd())
        with _ended_in_order():
            return flow()
    except Exception as error:
        text = explain(error)
        if text is None or os.environ.get("POPEN_DEBUG"):
            raise
        sys.exit(f"error: {text}")
