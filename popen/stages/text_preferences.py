"""Stage `text_preferences` (P_t): the SFT model's sampled answers, corrected by the ground truth."""

from __future__ import annotations

from pathlib import Path

from popen.stages.run import stage

MODEL, OUT = Path("artifacts/models/sft"), Path("artifacts/preferences/text.jsonl")


def main() -> None:
    with stage("text_preferences") as run:
        from popen.model.segmenter import Segmenter
        from popen.preference.records import write_text_pairs
        from popen.preference.sampling import text_pairs
        from popen.stages.learning import samples

        params = run.params
        pairs = list(
            text_pairs(
                Segmenter.load(MODEL),
                Path(params.data.root),
                samples("preference"),
                params.text_preferences,
                params.evaluate.batch,
                params.evaluate.max_new_tokens,
                params.data.max_pixels,
                params.seed,
            )
        )
        write_text_pairs(OUT, pairs)
        run.log_metrics(
            {"pairs": len(pairs), "corrected": sum(pair.differs for pair in pairs) / max(1, len(pairs))}
        )


if __name__ == "__main__":
    main()
