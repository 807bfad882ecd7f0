"""The stage `control`: its learning rates."""

from __future__ import annotations

from pathlib import Path

from popen.params import load
from popen.stages.control import at_rate

ROOT = Path(__file__).parents[2]


def test_both_optimisers_learn_at_the_share() -> None:
    train = load(ROOT / "params.yaml").align.train
    slower = at_rate(train, 0.5)
    assert (slower.lr, slower.muon) == (0.5 * train.lr, 0.5 * train.muon)
    assert train.muon > 0
    assert slower.model_copy(update={"lr": train.lr, "muon": train.muon}) == train
