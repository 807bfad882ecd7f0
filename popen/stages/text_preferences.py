"""Stage `text_preferences` (P_t): the SFT model's sampled answers, corrected by rule, a judge or people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from popen.params import Params
from popen.stages.artifacts import MODELS, PREFERENCES, TEXT_PAIRS, index, samples
from popen.stages.run import stage

if TYPE_CHECKING:
    from popen.model.segmenter import Segmenter
    from popen.parts import Parts
    from popen.preference.records import Skipped, TextPair
    from popen.preference.sources import Source
    from popen.samples import Sample

MODEL, SKIPPED = MODELS / "sft", PREFERENCES / "skipped.jsonl"


def main() -> None:
    with stage("text_preferences", shared=True) as run:
        from popen import devices
        from popen.preference.people import FOLDER
        from popen.preference.records import read_records, write_records
        from popen.preference.sampling import PairsError
        from popen.stages.kept import kept_parts

        params, asked = run.params, samples("preference")
        settings = [
            params.text_preferences,
            params.evaluate.batch,
            params.evaluate.max_new_tokens,
            params.align.train.bf16,
        ]
        inputs = [MODEL, index("preference"), *[FOLDER] * (params.text_preferences.source == "people")]
        # a judge's requests wait for its endpoint, not for this machine, and share one budget
        cores = devices.cores() if params.text_preferences.source == "rule" else 1
        parts = kept_parts(run, inputs, settings, write_records, read_records, cores)
        pairs, skipped = make(params, asked, _source(params, asked, run.home), parts)
        if not run.main:
            return
        if not pairs and skipped:
            raise PairsError(
                f"text_preferences: none of {len(asked)} questions has a corrected answer; of the first one:"
                f" {skipped[0].reason}"
            )
        write_records(TEXT_PAIRS, pairs)
        write_records(SKIPPED, skipped)
        if skipped:
            run.say(f"{len(skipped)} answers have no correction, {SKIPPED} says why")
        run.log_metrics(
            {
                "pairs": len(pairs),
                "corrected": sum(pair.differs for pair in pairs) / max(1, len(pairs)),
                "skipped": len(skipped),
            }
        )
        parts.clear()


def make(
    params: Params, asked: Sequence[Sample], source: Source, parts: Parts[TextPair | Skipped] | None = None
) -> tuple[list[TextPair], list[Skipped]]:
    """Sample answers to the questions under the parameters, and have the source correct them."""
    from popen import devices
    from popen.model.segmenter import Segmenter
    from popen.preference.records import Skipped, TextPair
    from popen.preference.sampling import text_pairs

    model = Segmenter.load(MODEL).to(devices.device())
    _stop_without_room(model, asked, params.evaluate.max_new_tokens)
    made = list(
        text_pairs(
            model,
            Path(params.data.root),
            asked,
            params.text_preferences,
            params.evaluate.batch,
            params.evaluate.max_new_tokens,
            params.data.max_pixels,
            params.seed,
            source,
            parts,
            bf16=params.align.train.bf16,
        )
    )
    pairs = [record for record in made if isinstance(record, TextPair)]
    return pairs, [record for record in made if isinstance(record, Skipped)]


def _stop_without_room(model: Segmenter, asked: Sequence[Sample], answer: int) -> None:
    """Before the first answers are made: the language model must have room for them."""
    from popen.model.segmenter import ModelError

    longest = max((len(model.encoder.question_ids(sample.question)) for sample in asked), default=0)
    if longest + answer > model.room:
        raise ModelError(
            f"evaluate.max_new_tokens is {answer}, but behind an image and the longest question ({longest} "
            f"tokens) the language model has room for {model.room - longest}: lower it, or raise "
            "model.language.max_length, with which SFT is trained anew"
        )


def _source(params: Params, asked: Sequence[Sample], home: Path) -> Source:
    chosen = params.text_preferences
    if chosen.source == "judge" and chosen.judge:
        from popen.preference.judge import Judge

        kept = home / ".checkpoints" / "judge"
        return Judge(chosen.judge, Path(params.data.root), params.data.max_pixels, kept)
    if chosen.source == "people" and chosen.people:
        from popen.preference.people import FOLDER, Corrections

        return Corrections.read(FOLDER / chosen.people.file, asked)
    from popen.preference.sampling import rule

    return rule


if __name__ == "__main__":
    main()
