"""The stage `validate` in a folder of its own, on a tiny tree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from popen.samples import read_index
from popen.stages import validate
from popen.stages.run import QUIET
from tests.data.trees import MSCOCO, muse_record, write_muse

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's address; one for this file, for making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('records')}/mlflow.db"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: str) -> Path:
    """A DVC root with a tiny tree, in which the first question of the last record is empty."""
    write_muse(tmp_path / "data", "train", [muse_record(file_name="0.png")])
    spoilt = muse_record(file_name="1.png", questions=["", "b", "c"])
    write_muse(tmp_path / "data", "val", [muse_record(file_name="2.png"), spoilt])
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (*QUIET, "HF_HUB_OFFLINE"):  # the stage sets them: take them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MLFLOW_RUN_ID", "POPEN_PARENT_RUN", "POPEN_DEBUG", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", records)
    return tmp_path


def tolerate(clone: Path, share: float) -> None:
    params = yaml.safe_load(PARAMS.read_text())
    params["data"] |= {"root": "data", "splits": {"train": ["muse/train"], "val": ["muse/val"]}}
    params["contract"] |= {"tolerated": share}
    params["benchmarks"] = ["val"]
    (clone / "params.yaml").write_text(yaml.safe_dump(params))


def test_a_broken_record_stops_the_stage_but_leaves_the_report(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tolerate(clone, 0.0)
    with pytest.raises(SystemExit) as stopped:
        validate.main()
    assert stopped.value.code == 1
    assert "muse/muse_val.json, record 1/0: questions are not empty" in capsys.readouterr().err
    assert "the pipeline stops here" in (clone / "artifacts/contract/report.html").read_text()
    assert len((clone / "artifacts/contract/quarantine.jsonl").read_text().splitlines()) == 1
    assert not (clone / "artifacts/index").exists()


def test_a_tolerated_record_is_quarantined_and_the_rest_indexed(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tolerate(clone, 0.5)  # 1 of the 2 records of `val`
    validate.main()
    assert "data.splits has no role preference: a stage that needs it will stop" in capsys.readouterr().out
    assert len(list(read_index(clone / "artifacts/index/train.jsonl"))) == 3
    kept = list(read_index(clone / "artifacts/index/val.jsonl"))
    assert [sample.uid for sample in kept] == [f"muse/val/{i}" for i in ("0/0", "0/1", "0/2", "1/1", "1/2")]
    assert all(len(sample.digest) == 64 for sample in kept)
    (line,) = (clone / "artifacts/contract/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "file": "muse/muse_val.json",
        "record": "1/0",
        "rule": "questions are not empty",
        "image": f"{MSCOCO}/train2014/1.png",
    }
    assert json.loads((clone / "artifacts/contract/report.json").read_text())["accepted"]
