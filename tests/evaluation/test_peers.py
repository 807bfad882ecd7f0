"""The peers' figures against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from popen.evaluation.benchmark import rows, summarise
from popen.evaluation.peers import PER_TARGET, per_target
from popen.evaluation.prediction import Prediction
from popen.evaluation.table import results, summary
from popen.samples import Sample

Ask = Callable[..., Sample]
Say = Callable[..., Prediction]


@pytest.fixture
def answered(ask: Ask, say: Say) -> tuple[list[Sample], list[Prediction]]:
    """Two questions about one image, one about another."""
    samples = [
        ask("muse/val/0/0", [("cup", (0, 0, 4, 2)), ("fork", (4, 4, 2, 2))], ["cup", "fork"]),
        ask("muse/val/0/1", [("cup", (0, 0, 4, 2))], ["cup"]),
        ask("muse/val/1/0", [("spoon", (0, 0, 2, 2))], ["spoon"]),
    ]
    predictions = [
        say("muse/val/0/0", "The cup {seg}.", (0, 0, 2, 2)),  # half of the cup; the fork is missed
        say("muse/val/0/1", "The cup {seg} {seg}.", (0, 0, 4, 4), (6, 6, 2, 2)),  # too large; one too many
        say("muse/val/1/0", "There is none."),
    ]
    return samples, predictions


def test_muse_over_targets(answered: tuple[list[Sample], list[Prediction]]) -> None:
    table = rows(*answered)
    assert list(table["pairs_intersection"]) == [4, 8, 0]
    assert list(table["areas"]) == [4 + 8 + 4, 16 + 4 + 8, 4]
    found = per_target(table)
    # the first image: 3 masks and 3 targets, of which two pairs match at 1/2 each; the second: 0 and 1
    assert found["per_target/gIoU"] == pytest.approx((0.5 + 0.5) / (3 + 1))
    # pairs, a mask too many and two targets missed: unions 8 and 16, areas 4, and 4 and 4
    assert found["per_target/cIoU"] == pytest.approx((4 + 8) / (8 + 16 + 4 + 4 + 4))
    # what every question counts the same for is another figure
    assert summarise(table)["gIoU_matched"] == pytest.approx((0.25 + 0.25 + 0) / 3)


def test_only_muse_is_measured_so(ask: Ask, say: Say) -> None:
    table = rows(
        [ask("refcoco/val/0/0", [("cup", (0, 0, 4, 2))], ["cup"])], [say("refcoco/val/0/0", "None.")]
    )
    assert per_target(table) == {}


def test_nothing_asked_and_nothing_answered_counts_nothing(ask: Ask, say: Say) -> None:
    table = rows([ask("muse/val/0/0", [], ["cup"])], [say("muse/val/0/0", "None.")])
    assert per_target(table) == dict.fromkeys(PER_TARGET)


def test_a_table_of_their_own_which_leaves_out_what_was_not_measured(
    answered: tuple[list[Sample], list[Prediction]],
) -> None:
    table = rows(*answered)
    plain = summarise(table)
    forced = {"teacher_forced/gIoU": 0.625, "teacher_forced/cIoU": 0.5}
    figures = {
        "muse_val": {
            "popen": plain | per_target(table) | forced,
            "popen+ensemble": plain | per_target(table) | dict.fromkeys(forced),
        },
        "refcoco": {"popen": plain},
    }
    text = results(figures, {}, 10)
    before, _, own = text.partition("## As the peers measure")
    assert "62.5" not in before
    assert "| benchmark | system | teacher-forced gIoU | teacher-forced cIoU | per-target gIoU |" in own
    assert "| muse_val | popen | 62.5 | 50.0 | 25.0 | 33.3 |" in own
    assert "| muse_val | popen+ensemble | – | – | 25.0 | 33.3 |" in own
    assert "refcoco" not in own.partition("| benchmark")[2]
    assert "As the peers" not in results({"refcoco": {"popen": plain}}, {}, 10)
    out = summary(figures, {})
    assert out["muse_val"]["popen"]["teacher_forced/gIoU"] == 0.625
    assert out["muse_val"]["popen+ensemble"]["teacher_forced/gIoU"] is None
    assert "teacher_forced/gIoU" not in out["refcoco"]["popen"]
