"""Stage `mask_preferences` (P_s): pairs of masks from perturbed images, ranked by IoU."""

from __future__ import annotations

from pathlib import Path

from popen.stages.artifacts import MODELS, PREFERENCES, TEXT_PAIRS
from popen.stages.run import stage

MODEL = MODELS / "sft"


def main() -> None:
    with stage("mask_preferences", shared=True) as run:
        from popen import devices
        from popen.model.segmenter import Segmenter
        from popen.preference.records import read_text_pairs
        from popen.preference.sampling import mask_pairs, read_mask_pairs, write_mask_pairs
        from popen.stages.kept import kept_parts

        params = run.params
        settings = [
            params.mask_preferences,
            params.evaluate.batch,
            params.align.mask_form,
            params.align.train.bf16,
        ]
        parts = kept_parts(
            run, [MODEL, TEXT_PAIRS], settings, write_mask_pairs, read_mask_pairs, devices.cores()
        )
        texts = list(read_text_pairs(TEXT_PAIRS))
        found = mask_pairs(
            Segmenter.load(MODEL).to(devices.device()),
            Path(params.data.root),
            texts,
            params.mask_preferences,
            max(1, params.evaluate.batch // 2),
            params.data.max_pixels,
            params.seed,
            params.align.mask_form == "mask",
            parts,
            bf16=params.align.train.bf16,
        )
        targets = sum(len(text.targets) for text in texts)
        for part, pairs in found.items():
            pairs.save(PREFERENCES / f"masks_{part}")
            winner, loser, clean = pairs.ious.mean(0).tolist()
            run.log_metrics(
                {
                    f"{part}/pairs": len(pairs),
                    f"{part}/share_of_targets": len(pairs) / targets,
                    f"{part}/iou/winner": winner,
                    f"{part}/iou/loser": loser,
                    f"{part}/iou/clean": clean,
                }
            )
            run.say(
                f"{part}: {len(pairs)} pairs of {targets} targets; IoU {winner:.2f} over {loser:.2f},"
                f" clean {clean:.2f}"
            )
        if run.main:
            parts.clear()


if __name__ == "__main__":
    main()
