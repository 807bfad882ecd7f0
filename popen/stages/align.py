"""Stage `align@coarse|fine`: L_pre on the preference data. Coarse starts from SFT, fine from coarse."""

from __future__ import annotations

import sys
from pathlib import Path

from popen.stages.artifacts import MODELS, PREFERENCES, TEXT_PAIRS
from popen.stages.run import stage

FROM_TO = {"coarse": ("sft", "coarse"), "fine": ("coarse", "popen")}


def main(part: str) -> None:
    with stage(f"align@{part}", shared=True) as run:
        from popen.model.segmenter import Segmenter
        from popen.preference.alignment import align_loss, collate
        from popen.preference.records import MaskPairs, read_text_pairs
        from popen.stages.learning import fit, pair_plan

        params, masks = run.params, PREFERENCES / f"masks_{part}"
        start, out = (MODELS / name for name in FROM_TO[part])
        model = Segmenter.load(start)
        model.tower.requires_grad_(False)
        train = params.align.train
        # fine goes on behind the pairs of coarse: the two see what `chosen` sees, in its order
        seen = train.steps * train.images * train.accumulate if part == "fine" else 0
        plan = pair_plan(list(read_text_pairs(TEXT_PAIRS)), params.seed, seen)
        fit(
            run,
            model,
            train,
            plan,
            collate(model, Path(params.data.root), params.data.max_pixels, MaskPairs.load(masks)),
            align_loss(params.align, params.sft.loss),
            None,
            [start, TEXT_PAIRS, masks],
            [params.align, params.sft.loss],
            lambda: model.save(out),
        )


if __name__ == "__main__":
    if sys.argv[1:] not in ([part] for part in FROM_TO):
        sys.exit(f"usage: python -m popen.stages.align {'|'.join(FROM_TO)}")
    main(sys.argv[1])
