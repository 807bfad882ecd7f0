"""The report from a tiny set of drawn images, questions and predictions, end to end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from popen import params as parameters
from popen.evaluation.benchmark import rows, summarise
from popen.evaluation.prediction import EvaluationError, Prediction, write_predictions
from popen.evaluation.table import COMPARED, PAIRS
from popen.masks import Mask, decode, encode
from popen.params import Params
from popen.samples import Region, Sample, write_index
from popen.stages.report import POOLED, build, collect, flat, write_teaser

BENCHMARKS = ["muse_test_less", "muse_test_many", "refcoco+", "grandf"]
SYSTEMS = ["sft", "control", "chosen", "popen", "popen+ensemble"]
QUESTIONS = 12
COLOURS = {"cup": (200, 40, 40), "fork": (40, 60, 190), "pear": (60, 160, 60)}


def square(left: int, top: int, side: int) -> Mask:
    mask = np.zeros((32, 32), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def draw(data: Path, name: str, number: int) -> Sample:
    """A picture of a cup and a fork, and the question for both."""
    shapes = {"cup": square(2 + number, 3, 9), "fork": square(4, 18, 6 + number // 3)}
    pixels = np.full((32, 32, 3), 230, dtype=np.uint8)
    for kind, mask in shapes.items():
        pixels[mask] = COLOURS[kind]
    path = data / name / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    regions = tuple(Region(f"the {kind}", kind, encode(mask)) for kind, mask in shapes.items())
    return Sample(
        uid=f"{name}/{number}",
        benchmark=name.split("_")[0],
        split="test",
        image=f"{name}/{number}.png",
        height=32,
        width=32,
        question="What is on the table & <needed> for dinner?",
        answer="It is the cup {seg} and the fork {seg}.",
        targets=regions,
        objects=(*regions, Region("the pear", "pear", encode(square(0, 0, 1))))[: 3 if number == 0 else 2],
        kind=f"kind {number % 3}",
    )


def answer(sample: Sample, quality: int) -> Prediction:
    """The better the system, the fewer of its answers name a pear, and the less its masks are shifted."""
    number = int(sample.uid.split("/")[1])
    masks = [encode(np.roll(decode(target.rle), 4 - quality, 1)) for target in sample.targets]
    text = sample.answer
    if (number + quality) % (quality + 2) == 0 and quality < 4:
        text, masks = (
            "It is the cup {seg}, the fork {seg} and a pear {seg}.",
            [*masks, encode(square(20, 20, 5))],
        )
    return Prediction(sample.uid, text, tuple(masks), -0.5, 0.9, 0.1)


@pytest.fixture(scope="module")
def settings() -> Params:
    full = parameters.load(Path(__file__).parents[2] / "params.yaml")
    evaluate = full.evaluate.model_copy(update={"bootstrap": 100})
    return full.model_copy(update={"benchmarks": BENCHMARKS, "systems": SYSTEMS, "evaluate": evaluate})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, settings: Params) -> Path:
    """A project's root after the stage `evaluate`."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # no Java: METEOR would take seconds
        for name in BENCHMARKS:
            samples = [draw(root / "data", name, number) for number in range(QUESTIONS)]
            write_index(root / f"artifacts/index/{name}.jsonl", samples)
            for quality, system in enumerate(SYSTEMS):
                predictions = [answer(sample, quality) for sample in samples]
                write_predictions(
                    root / f"artifacts/evaluate/{name}/{system}/predictions.jsonl.gz", predictions
                )
                path = root / f"metrics/{name}/{system}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(summarise(rows(samples, predictions)), sort_keys=True))
    curves = root / "artifacts/curves"
    curves.mkdir()
    (curves / "sft.csv").write_text("step,name,value\n1,loss,2.0\n2,loss,1.0\n")
    (curves / "align_coarse.csv").write_text("step,name,value\n1,loss,0.5\n1,rewards_t/margins,0.1\n")
    points = [
        {"members": m, "mode": "mean", "seconds": 0.1 * m, "gIoU_matched": 0.6, "chair_s": 0.1}
        for m in (1, 2, 4)
    ]
    (root / "metrics/ensemble.json").write_text(json.dumps(points))
    return root


@pytest.fixture(scope="module")
def built(project: Path, settings: Params) -> tuple[dict[str, dict[str, dict[str, float]]], list[Path]]:
    return build(project, project / "data", settings)


def test_writes_everything(project: Path, built: tuple[object, list[Path]]) -> None:
    names = {path.relative_to(project).as_posix() for path in built[1]}
    plots = ("quality", "hallucination", "iou_histograms", "area_ratio", "ensemble")
    more = ("training", "alignment", "rewards")
    assert names == {
        "metrics/summary.json",
        "reports/results.md",
        "reports/examples.html",
        "reports/teaser.png",
        *(f"reports/plots/{plot}.png" for plot in plots + more),
    }
    for path in built[1]:
        if path.suffix == ".png":
            assert np.ptp(np.asarray(Image.open(path).convert("L"))) > 100


def test_summary_holds_every_figure_and_the_pooled_test_set(project: Path, built: object) -> None:
    summary = json.loads((project / "metrics/summary.json").read_text())
    assert set(summary) == {*BENCHMARKS, POOLED, "comparisons"}
    for name in (*BENCHMARKS, POOLED):
        assert list(summary[name]) == SYSTEMS
    popen = summary[POOLED]["popen"]
    assert popen["questions"] == 2 * QUESTIONS
    halves = [summary[part]["popen"] for part in ("muse_test_less", "muse_test_many")]
    assert popen["gIoU"] == pytest.approx(sum(half["gIoU"] for half in halves) / 2)
    # quality 3: 13 pixels to the left of 9 overlap; popen's masks are shifted by one, the ensemble's by none
    assert summary["refcoco+"]["popen+ensemble"]["gIoU"] == 1.0
    assert summary["refcoco+"]["popen+ensemble"]["chair_s"] == 0.0


def test_comparisons_agree_with_the_figures(
    built: tuple[dict[str, dict[str, dict[str, float]]], object],
) -> None:
    summary = built[0]
    compared = summary["comparisons"]
    assert len(compared) == (len(BENCHMARKS) + 1) * len(PAIRS) * len(COMPARED)
    for found in compared:
        by_system = summary[found["benchmark"]]  # type: ignore[index]
        a, b = (by_system[found[role]][found["metric"]] for role in ("system", "control"))  # type: ignore[index]
        assert found["difference"] == pytest.approx(a - b)  # type: ignore[index]
        assert found["low"] <= found["difference"] <= found["high"]  # type: ignore[index]


def test_examples_are_escaped_and_stand_alone(project: Path, built: object) -> None:
    html = (project / "reports/examples.html").read_text()
    assert "What is on the table &amp; &lt;needed&gt; for dinner?" in html
    assert "<needed>" not in html
    assert "Hallucinated" in html
    assert f"Questions of {POOLED}, answered freely: sft, popen and the truth." in html
    assert "1 absent" in html
    assert "http" not in html
    assert html.count('src="data:image/jpeg;base64,') == 3 * html.count("<article>") > 0


def test_same_inputs_same_bytes(project: Path, settings: Params, built: tuple[object, list[Path]]) -> None:
    before = {path: path.read_bytes() for path in built[1]}
    build(project, project / "data", settings)
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == []


def test_names_for_tracking(built: tuple[dict[str, dict[str, dict[str, float]]], object]) -> None:
    values = flat(built[0])
    assert values["gIoU/refcoco+/popen+ensemble"] == 1.0
    own = (2 + 4) * len(SYSTEMS)  # per target of the pooled MUSE questions; GranD_f's, without Java
    assert len(values) == (len(BENCHMARKS) + 1) * len(SYSTEMS) * 8 + own
    assert values["grandf/AP50/grandf/popen+ensemble"] == 1.0


def test_says_what_is_missing_and_which_stage_makes_it(
    project: Path, settings: Params, tmp_path: Path
) -> None:
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    (copy / "artifacts/evaluate/grandf/popen/predictions.jsonl.gz").unlink()
    with pytest.raises(
        EvaluationError, match=r"grandf/popen/predictions.jsonl.gz: no such file; run .* evaluate"
    ):
        build(copy, copy / "data", settings)
    sample = draw(copy / "data", "refcoco+", 0)
    write_index(copy / "artifacts/index/refcoco+.jsonl", [replace(sample, uid="refcoco+/99")])
    with pytest.raises(EvaluationError, match="refcoco\\+/99"):
        build(copy, copy / "data", settings)


def test_without_a_flawless_answer_there_is_no_teaser(project: Path, settings: Params) -> None:
    found = collect(project, ["refcoco+"], SYSTEMS)
    table = found.rows["refcoco+"]["popen+ensemble"]
    found.rows["refcoco+"]["popen+ensemble"] = table.assign(missing=1)
    (project / "other/reports").mkdir(parents=True)
    old = project / "other/reports/teaser.png"
    old.touch()
    assert write_teaser(project / "other", project / "data", settings.data.max_pixels, found) is None
    assert not old.exists()
