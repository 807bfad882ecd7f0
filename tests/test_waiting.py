"""What other tests wait by."""

from __future__ import annotations

import httpx
import pytest

from tests.waiting import until


def test_a_server_that_was_too_busy_is_asked_again() -> None:
    asked = list[int]()

    def condition() -> str:
        asked.append(len(asked))
        if len(asked) == 1:
            raise httpx.ReadTimeout("timed out")
        return "" if len(asked) == 2 else "found"

    assert until(condition) == "found"
    assert len(asked) == 3


def test_what_never_comes_and_what_is_no_delay_fail() -> None:
    with pytest.raises(AssertionError, match="never came"):
        until(lambda: None, patience=0.0)
    with pytest.raises(httpx.ConnectError):
        until(lambda: httpx.get("http://127.0.0.1:9/", timeout=5))  # the discard port: nobody listens
