"""The curriculum's two stages beside the control that is trained on the same pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from popen.model.segmenter import Segmenter
from popen.params import TrainParams
from popen.preference.records import write_records
from popen.samples import Sample
from popen.stages import align, chosen, learning
from popen.stages.artifacts import MODELS, PREFERENCES, TEXT_PAIRS
from popen.stages.run import QUIET
from tests.preference.test_sampling import masks, texts
from tests.stages.test_devices import clone


def test_coarse_and_fine_see_the_pairs_that_chosen_sees_in_its_order(
    taught: Segmenter, data: tuple[Path, list[Sample]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once had an order of its own, so that of the default's pairs a sixth was never learned from."""
    for name in (*QUIET, "HF_HUB_OFFLINE", "MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(clone(tmp_path, taught, data))
    taught.save(MODELS / "coarse")
    pairs = texts(taught, data)
    write_records(TEXT_PAIRS, pairs)
    for part in ("coarse", "fine"):
        masks(taught, data, pairs, part).save(PREFERENCES / f"masks_{part}")
    seen: list[list[str]] = []

    def fit(run: Any, model: Any, params: TrainParams, item: Any, *rest: Any) -> None:
        seen.append([item(n).uid for n in range(params.steps * params.images * params.accumulate)])

    monkeypatch.setattr(learning, "fit", fit)
    align.main("coarse")
    align.main("fine")
    chosen.main()
    assert [len(uids) for uids in seen] == [12, 12, 24]
    assert seen[0] + seen[1] == seen[2]
    assert set(seen[2][:4]) == {pair.uid for pair in pairs}
