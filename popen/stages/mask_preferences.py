"""Stage `mask_preferences@coarse|fine` (P_s): pairs of masks from perturbed images, ranked by IoU."""

from __future__ import annotations

import sys
from pathlib import Path

from popen.stages.run import stage

MODEL, OUT = Path("artifacts/models/sft"), Path("artifacts/preferences")
TEXT = OUT / "text.jsonl"


def main(part: str) -> None:
    with stage(f"mask_preferences@{part}") as run:
        from popen.model.segmenter import Segmenter
        from popen.preference.records import read_text_pairs
        from popen.preference.sampling import mask_pairs

        params = run.params
        texts = list(read_text_pairs(TEXT))
        pairs = mask_pairs(
            Segmenter.load(MODEL),
            Path(params.data.root),
            texts,
            params.mask_preferences,
            part,
            max(1, params.evaluate.batch // 2),
            params.data.max_pixels,
            params.seed,
        )
        pairs.save(OUT / f"masks_{part}")
        winner, loser, clean = pairs.ious.mean(0).tolist()
        targets = sum(len(text.targets) for text in texts)
        run.log_metrics(
            {
                "pairs": len(pairs),
                "share_of_targets": len(pairs) / targets,
                "iou/winner": winner,
                "iou/loser": loser,
                "iou/clean": clean,
            }
        )
        run.say(
            f"{len(pairs)} pairs of {targets} targets; IoU {winner:.2f} over {loser:.2f}, clean {clean:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
