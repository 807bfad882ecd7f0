"""When `retrain` makes a model, and when it registers none."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from flows.retraining import RetrainError, check_up_to_date, due
from flows.stage_process import reproduce
from tests.flows.conftest import Make, stage


def test_what_is_not_up_to_date_any_more_is_not_registered(make: Make) -> None:
    """Somebody edits a parameter while later stages run: dvc.lock and params.yaml would not fit."""
    root = make(
        {
            "a": stage("echo ${x} > a.txt", "a.txt", params=["x"]),
            "b": stage("cp a.txt b.txt", "b.txt", "a.txt"),
        },
        x=1,
    )
    for name in ("a", "b"):
        reproduce(root, name, print, stop=threading.Event())
    check_up_to_date(root)
    (root / "params.yaml").write_text("x: 2\n")
    with pytest.raises(RetrainError, match="nothing was registered: a would run again"):
        check_up_to_date(root)


def test_when_a_new_model_is_due() -> None:
    champion: Any = SimpleNamespace(version=4, tags={"data": "a"}, creation_timestamp=0)
    day = 86400.0
    assert due(None, "a", False, None, day) == "there is no champion yet"
    assert due(champion, "a", False, 30.0, 29 * day) is None
    assert due(champion, "a", False, None, 1000 * day) is None
    assert (
        due(champion, "a", False, 30.0, 31 * day) == "the champion (version 4) is 31.0 days old, 30 allowed"
    )
    assert due(champion, "b", False, None, day) == "the data is not that of the champion (version 4)"
    assert due(champion, "a", True, None, day) == "it was asked for (force)"
