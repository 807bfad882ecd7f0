"""Stage `text_preferences` (P_t): the SFT model's sampled answers, corrected by the ground truth."""

from __future__ import annotations

from pathlib import Path

from popen.stages.run import stage

MODEL, OUT = Path("artifacts/models/sft"), Path("artifacts/preferences/text.jsonl")


def main() -> None:
    with stage("text_preferences", shared=True) as run:
        from popen import devices
        from popen.model.segmenter import Segmenter
        from popen.preference.records import read_text_pairs, write_text_pairs
        from popen.preference.sampling import text_pairs
        from popen.stages.learning import INDEX, kept_parts, samples

        params = run.params
        settings = [params.text_preferences, params.evaluate.batch, params.evaluate.max_new_tokens]
        inputs = [MODEL, INDEX / "preference.jsonl"]
        parts = kept_parts(run, inputs, settings, write_text_pairs, read_text_pairs)
        pairs = list(
            text_pairs(
                Segmenter.load(MODEL).to(devices.device()),
                Path(params.data.root),
                samples("preference"),
                params.text_preferences,
                params.evaluate.batch,
                params.evaluate.max_new_tokens,
                params.data.max_pixels,
                params.seed,
                parts,
            )
        )
        if not run.main:
            return
        write_text_pairs(OUT, pairs)
        run.log_metrics(
            {"pairs": len(pairs), "corrected": sum(pair.differs for pair in pairs) / max(1, len(pairs))}
        )
        parts.clear()


if __name__ == "__main__":
    main()
