"""Stage `evaluate@BENCHMARK-SYSTEM`: free-running answers of a system to a benchmark, and their metrics; the
figures as the peers measure them beside these, under names of their own."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from popen.stages.artifacts import MODELS, index, predictions, samples, threshold
from popen.stages.run import stage


def main(benchmark: str, system: str) -> None:
    with stage(f"evaluate@{benchmark}-{system}", shared=True) as run:
        from popen import devices
        from popen.evaluation.answering import prediction
        from popen.evaluation.benchmark import rows, summarise
        from popen.evaluation.peers import TEACHER_FORCED, per_target
        from popen.evaluation.prediction import Prediction, read_predictions, write_predictions
        from popen.evaluation.teacher_forced import figures, overlaps, read_overlaps, write_overlaps
        from popen.model.segmenter import Segmenter
        from popen.parts import in_batches
        from popen.stages.kept import kept_parts
        from popen.stages.systems import answerer, load

        cores = devices.cores()
        params, asked, level = run.params, samples(benchmark), threshold(system)
        inputs = [MODELS / system, index(benchmark)]
        parts = kept_parts(
            run,
            inputs,
            [params.evaluate.model_dump(exclude={"bootstrap"}), params.ensemble, level],
            write_predictions,
            read_predictions,
            cores,
        )
        model = load(system, devices.device())
        ask = answerer(model, params, asked)

        def predict(start: int) -> list[Prediction]:
            return [prediction(sample, answer, level, seconds) for sample, answer, seconds in ask(start)]

        batches = range(0, len(asked), params.evaluate.batch)
        forced, overlapping = dict.fromkeys(TEACHER_FORCED), None  # an ensemble chooses: no answer to feed
        with devices.autocast(params.evaluate.bf16):
            found = list(in_batches(batches, predict, run.name, parts))
            if isinstance(model, Segmenter):
                feed = partial(overlaps, model, Path(params.data.root), max_pixels=params.data.max_pixels)
                settings = ["teacher-forced", params.evaluate.batch, params.evaluate.bf16]
                overlapping = kept_parts(run, inputs, settings, write_overlaps, read_overlaps, cores)
                again = in_batches(
                    batches,
                    lambda start: feed(asked[start : start + params.evaluate.batch]),
                    f"{run.name} teacher-forced",
                    overlapping,
                )
                forced = figures(list(again))
        if not run.main:
            return
        write_predictions(predictions(benchmark, system), found)
        table = rows(asked, found)
        summary = summarise(table) | per_target(table) | forced
        out = Path("metrics") / benchmark / f"{system}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        run.set_tags({"benchmark": benchmark, "system": system})
        run.log_metrics({name: value for name, value in summary.items() if isinstance(value, int | float)})
        for kept in (parts, overlapping):
            if kept is not None:
                kept.clear()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m popen.stages.evaluate BENCHMARK SYSTEM")
    main(sys.argv[1], sys.argv[2])
