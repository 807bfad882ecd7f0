"""The graph is DVC's: order, edges, targets, what changed; on a project of shell commands and on this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.dvc_graph import GraphError, Stage, read, unaccompanied
from tests.flows.conftest import Make, import_data, stage

ROOT = Path(__file__).parents[2]
STAGES = {
    "last": stage("cat b@*.txt > d.txt", "d.txt", "b@1.txt", "b@2.txt"),
    "b": {"foreach": [1, 2], "do": stage("cp a.txt b@${item}.txt", "b@${item}.txt", "a.txt")},
    "a": stage("cp data a.txt", "a.txt", "data", params=["x"]),
    "alone": stage("echo 1 > alone.txt", "alone.txt"),
}


@pytest.fixture
def root(make: Make, tmp_path: Path) -> Path:
    (tmp_path / "source").write_text("1")
    root = make(STAGES, x=1)
    import_data(root, tmp_path / "source")
    return root


def test_stages_come_after_what_they_need(root: Path) -> None:
    stages = read(root)
    needs = {stage.name: stage.needs for stage in stages}
    assert needs == {
        "data.dvc": (),
        "a": ("data.dvc",),
        "b@1": ("a",),
        "b@2": ("a",),
        "last": ("b@1", "b@2"),
        "alone": (),
    }
    order = [stage.name for stage in stages]
    assert all(order.index(need) < order.index(name) for name in needs for need in needs[name])


def test_targets_bring_what_they_need(root: Path) -> None:
    assert {stage.name for stage in read(root, ["b@2"])} == {"data.dvc", "a", "b@2"}
    assert [stage.name for stage in read(root, ["alone", "alone"])] == ["alone"]
    with pytest.raises(GraphError, match=r"'nowhere'.*dvc stage list"):
        read(root, ["nowhere"])


def test_changed_is_what_dvc_would_run(root: Path, tmp_path: Path) -> None:
    changed = {stage.name for stage in read(root) if stage.changed}
    assert changed == {"a", "b@1", "b@2", "last", "alone"}  # the data were fetched when they were imported
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)
    assert not [stage for stage in read(root) if stage.changed]
    (root / "params.yaml").write_text("x: 2\n")
    assert {stage.name for stage in read(root) if stage.changed} == {"a"}
    (tmp_path / "source").write_text("2")
    assert {stage.name for stage in read(root) if stage.changed} == {"a", "data.dvc"}


def test_a_frozen_stage_is_cut_off_from_what_it_needs(root: Path) -> None:
    subprocess.run(["dvc", "freeze", "-q", "a"], cwd=root, check=True)
    assert Stage("a", (), True) in read(root)
    assert "data.dvc" not in {stage.name for stage in read(root, ["b@1"])}


def test_a_source_that_does_not_answer_counts_as_changed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "source").unlink()
    assert next(stage for stage in read(root) if stage.name == "data.dvc").changed


def test_the_graph_of_this_project(make: Make) -> None:
    root = make({})
    for name in ("dvc.yaml", "params.yaml", "data.dvc", "dvc.lock"):
        shutil.copy(ROOT / name, root)
    needs = {stage.name: stage.needs for stage in read(root)}
    assert needs["validate"] == ("data.dvc",)
    assert needs["align@fine"][0] == "align@coarse"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    evaluations = [f"evaluate@{b}-{s}" for b in params["benchmarks"] for s in params["systems"]]
    assert set(evaluations) <= set(needs["report"]) <= set(needs)
    alone = unaccompanied(read(root))
    assert alone == {"data.dvc", "validate", "pretrain_vision", "sft", "calibrate"}
