"""Stage `evaluate@BENCHMARK-SYSTEM`: free-running answers of a system to a benchmark, and their metrics; the
figures as the peers measure them beside these, under names of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from popen.stages.run import stage


def main(benchmark: str, system: str) -> None:
    with stage(f"evaluate@{benchmark}-{system}") as run:
        from popen.evaluation.answering import prediction
        from popen.evaluation.benchmark import rows, summarise
        from popen.evaluation.peers import TEACHER_FORCED, per_target
        from popen.evaluation.prediction import write_predictions
        from popen.evaluation.teacher_forced import teacher_forced
        from popen.model.segmenter import Segmenter
        from popen.stages.learning import samples
        from popen.stages.systems import load, system_answers, threshold

        asked, level, model = samples(benchmark), threshold(system), load(system)
        found = [
            prediction(sample, answer, level, seconds)
            for sample, answer, seconds in system_answers(model, run.params, asked, run.name)
        ]
        write_predictions(Path("artifacts/evaluate") / benchmark / system / "predictions.jsonl.gz", found)
        table = rows(asked, found)
        forced = dict.fromkeys(TEACHER_FORCED)  # an ensemble chooses among answers: it has none with one fed
        if isinstance(model, Segmenter):
            data, size = run.params.data, run.params.evaluate.batch
            forced = teacher_forced(model, Path(data.root), asked, size, data.max_pixels, run.name)
        summary = summarise(table) | per_target(table) | forced
        out = Path("metrics") / benchmark / f"{system}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        run.set_tags({"benchmark": benchmark, "system": system})
        run.log_metrics({name: value for name, value in summary.items() if isinstance(value, int | float)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
