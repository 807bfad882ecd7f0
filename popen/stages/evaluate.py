"""Stage `evaluate@BENCHMARK-SYSTEM`: free-running answers of a system to a benchmark, and their metrics; the
figures as the peers measure them beside these, under names of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from popen.stages.run import stage


def main(benchmark: str, system: str) -> None:
    with stage(f"evaluate@{benchmark}-{system}", shared=True) as run:
        from popen import devices
        from popen.evaluation.answering import prediction
        from popen.evaluation.benchmark import rows, summarise
        from popen.evaluation.peers import TEACHER_FORCED, per_target
        from popen.evaluation.prediction import Prediction, read_predictions, write_predictions
        from popen.evaluation.teacher_forced import teacher_forced
        from popen.model.segmenter import Segmenter
        from popen.parts import in_batches
        from popen.stages.learning import INDEX, MODELS, kept_parts, samples
        from popen.stages.systems import answerer, load, threshold

        params, asked, level = run.params, samples(benchmark), threshold(system)
        parts = kept_parts(
            run,
            [MODELS / system, INDEX / f"{benchmark}.jsonl"],
            [params.evaluate.batch, params.evaluate.max_new_tokens, params.ensemble, level],
            write_predictions,
            read_predictions,
        )
        model = load(system, devices.device())
        ask = answerer(model, params, asked)

        def predict(start: int) -> list[Prediction]:
            return [prediction(sample, answer, level, seconds) for sample, answer, seconds in ask(start)]

        found = list(in_batches(range(0, len(asked), params.evaluate.batch), predict, run.name, parts))
        if not run.main:
            return
        write_predictions(Path("artifacts/evaluate") / benchmark / system / "predictions.jsonl.gz", found)
        table = rows(asked, found)
        forced = dict.fromkeys(TEACHER_FORCED)  # an ensemble chooses among answers: it has none with one fed
        if isinstance(model, Segmenter):
            data, size = params.data, params.evaluate.batch
            forced = teacher_forced(model, Path(data.root), asked, size, data.max_pixels, run.name)
        summary = summarise(table) | per_target(table) | forced
        out = Path("metrics") / benchmark / f"{system}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        run.set_tags({"benchmark": benchmark, "system": system})
        run.log_metrics({name: value for name, value in summary.items() if isinstance(value, int | float)})
        parts.clear()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
