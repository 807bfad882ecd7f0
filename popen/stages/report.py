"""Stage `report`: from the predictions a summary, a table, plots, a page of examples and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from tqdm import tqdm

from popen.data.images import open_image
from popen.evaluation import benchmark, page, peers, plots, table
from popen.evaluation.overlay import beside, overlay
from popen.evaluation.prediction import EvaluationError, Prediction, read_predictions
from popen.masks import decode
from popen.params import Params
from popen.samples import Sample, read_index
from popen.stages import artifacts
from popen.stages.run import stage

POOLED = "all_muse_test"  # the two MUSE test sets as one: the questions of the claims
PARTS = ("muse_test_less", "muse_test_many")
EXAMPLES = 4  # questions a heading
LONG = ("pretrain_vision", "sft")  # stages of thousands of steps, drawn apart from those of dozens


@dataclass
class Evaluated:
    """Everything that was measured; keys are benchmarks and systems."""

    samples: dict[str, Sample] = field(default_factory=dict)  # uid -> question
    predictions: dict[str, dict[str, Prediction]] = field(default_factory=dict)  # system -> uid -> answer
    rows: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict)  # benchmark -> system -> rows
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same, summarised


def _there(path: Path, maker: str) -> Path:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; run the stage {maker} (dvc repro {maker})")
    return path


def collect(root: Path, benchmarks: Sequence[str], systems: Sequence[str]) -> Evaluated:
    """Read questions, predictions and figures below the project's root; adds the pooled MUSE test set."""
    found = Evaluated()
    for name in tqdm(benchmarks, desc="reading predictions", unit="benchmark"):
        samples = list(read_index(_there(root / artifacts.index(name), "validate")))
        found.samples |= {sample.uid: sample for sample in samples}
        found.rows[name], found.figures[name] = {}, {}
        for system in systems:
            path = _there(root / artifacts.predictions(name, system), "evaluate")
            predictions = list(read_predictions(path))
            found.predictions.setdefault(system, {}).update({p.uid: p for p in predictions})
            found.rows[name][system] = benchmark.rows(samples, predictions)
            figures = _there(root / f"metrics/{name}/{system}.json", "evaluate")
            found.figures[name][system] = json.loads(figures.read_text(encoding="utf-8"))
    if all(part in found.rows for part in PARTS):
        found.rows[POOLED] = {
            system: pd.concat([found.rows[part][system] for part in PARTS], ignore_index=True)
            for system in systems
        }
        found.figures[POOLED] = {
            system: benchmark.summarise(rows) | peers.per_target(rows)
            for system, rows in found.rows[POOLED].items()
        }
    return found


def read_curves(folder: Path) -> dict[str, pd.DataFrame]:
    """Stage -> its curve file (columns step, name, value), in the order of the names."""
    return {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}


def write_plots(root: Path, found: Evaluated, resamples: int, seed: int) -> Iterator[Path]:
    """Write the figures to reports/plots; yields each path."""
    figures = {
        "quality": plots.bars(found.rows, ("gIoU_matched", "gIoU", "cIoU"), resamples, seed),
        "hallucination": plots.bars(found.rows, ("chair_s", "chair_i", "missing"), resamples, seed),
        "iou_histograms": plots.iou_histograms(found.rows),
        "area_ratio": plots.area_ratio(found.rows),
    }
    series = read_curves(root / artifacts.CURVES)
    long = {stage: frame for stage, frame in series.items() if stage in LONG}
    short = {stage: frame for stage, frame in series.items() if stage not in LONG}
    for title, part in (("training", long), ("alignment", short)):
        names = sorted({str(name) for frame in part.values() for name in frame["name"]})
        rewards = [name for name in names if name.startswith("rewards")]
        for drawing, chosen in ((title, [n for n in names if n not in rewards]), ("rewards", rewards)):
            if chosen:
                figures[drawing] = plots.curves(part, chosen)
    sizes = root / "metrics/ensemble.json"
    if sizes.is_file():
        figures["ensemble"] = plots.ensemble(json.loads(sizes.read_text(encoding="utf-8")))
    for name, figure in figures.items():
        path = root / f"reports/plots/{name}.png"
        plots.save(figure, path)
        yield path


def _note(rows: pd.DataFrame, uid: str) -> str:
    row = rows[rows["uid"] == uid].iloc[0]
    faults = [
        f"{row[key]} {word}" for key, word in (("hallucinated", "absent"), ("missing", "missed")) if row[key]
    ]
    return ", ".join([f"IoU {row['matched']:.2f}", *faults])


def _shown(found: Evaluated) -> tuple[str, str, str]:
    """The benchmark to take examples from, and the two systems that are put side by side."""
    name = POOLED if POOLED in found.rows else next(iter(found.rows))
    systems = list(found.rows[name])
    return name, systems[0], "popen" if "popen" in systems else systems[-1]


def example(found: Evaluated, uid: str, image: Image.Image) -> page.Example:
    """One question with the answers of the two systems and the truth."""
    name, before, after = _shown(found)
    sample, rows = found.samples[uid], found.rows[name]
    panels = [
        page.Panel(system, tuple(map(decode, answer.masks)), answer.text, _note(rows[system], uid))
        for system, answer in ((name, found.predictions[name][uid]) for name in (before, after))
    ]
    panels.append(page.Panel("truth", tuple(decode(t.rle) for t in sample.targets), sample.answer))
    return page.Example(uid, sample.question, image, tuple(panels))


def write_examples(root: Path, data: Path, max_pixels: int, found: Evaluated) -> Path:
    """Write reports/examples.html."""
    name, before, after = _shown(found)
    rows = found.rows[name]
    sections = {
        heading: [example(found, uid, open_image(data, found.samples[uid].image, max_pixels)) for uid in uids]
        for heading, uids in page.choose(rows[before], rows[after], EXAMPLES).items()
    }
    lead = (
        f"Questions of {name}, answered freely: {before}, {after} and the truth. Chosen by rule from "
        f"{len(rows[after])} questions: the extremes of each measure for {after}, good and bad."
    )
    path = root / "reports/examples.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.page("Examples", lead, sections), encoding="utf-8")
    return path


def write_teaser(root: Path, data: Path, max_pixels: int, found: Evaluated) -> Path | None:
    """Write reports/teaser.png, flawless answers of the last system; None (no file) where there are none."""
    rows = found.rows[_shown(found)[0]]
    system = list(rows)[-1]
    images = {uid: sample.image for uid, sample in found.samples.items()}
    path = root / "reports/teaser.png"
    uids = page.showpieces(rows[system], images, 4)
    if not uids:
        path.unlink(missing_ok=True)
        return None
    pictures = []
    for uid in uids:
        answer = found.predictions[system][uid]
        image = open_image(data, images[uid], max_pixels)
        masks = [decode(rle) for rle in answer.masks]
        pictures.append(overlay(image, masks, answer.text, found.samples[uid].question))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside(pictures).save(path)
    return path


def build(root: Path, data: Path, params: Params) -> tuple[dict[str, Any], list[Path]]:
    """Write the whole report below `root` (the project's), images from `data`.

    Returns the contents of metrics/summary.json and the files written.
    """
    found = collect(root, params.benchmarks, params.systems)
    resamples, seed, limit = params.evaluate.bootstrap, params.seed, params.data.max_pixels
    compared = table.compare_all(found.rows, resamples, seed)
    summary = table.summary(found.figures, compared)
    path = root / "metrics/summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    results = root / "reports/results.md"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(table.results(found.figures, compared, resamples), encoding="utf-8")
    drawn = tqdm(write_plots(root, found, resamples, seed), desc="drawing", unit="plot")
    written = [path, results, *drawn, write_examples(root, data, limit, found)]
    teaser = write_teaser(root, data, limit, found)
    return summary, written if teaser is None else [*written, teaser]


def flat(summary: dict[str, Any]) -> dict[str, float]:
    """Figures for MLflow: `<metric>/<benchmark>/<system>`, so that one metric's systems stand together."""
    return {
        f"{metric}/{name}/{system}": float(value)
        for name, by_system in summary.items()
        if name != "comparisons"
        for system, figures in by_system.items()
        for metric, value in figures.items()
        if value is not None
    }


def main() -> None:
    with stage("report") as run:
        summary, written = build(run.root, run.root / run.params.data.root, run.params)
        run.log_metrics(flat(summary))
        for path in written:
            run.log_artifact(path)


if __name__ == "__main__":
    main()
