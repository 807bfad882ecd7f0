"""The stage with each source: where judge and people say what the rule says, the records are the same."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from popen import cli_corrections
from popen.errors import explain
from popen.model import IGNORED
from popen.model.segmenter import ModelError, Segmenter
from popen.params import load
from popen.preference.alignment import chosen_rows
from popen.preference.judge import KEY
from popen.preference.people import CorrectionsError
from popen.preference.records import read_text_pairs, write_records
from popen.preference.sampling import rule
from popen.preference.sources import first_wrong
from popen.preference.text import correct
from popen.samples import Sample, write_index
from popen.stages import text_preferences
from popen.stages.artifacts import TEXT_PAIRS
from popen.stages.run import QUIET
from tests.preference.endpoint import by_words, completion, judged, numbers, serving

PARAMS = Path(__file__).parents[2] / "params.yaml"
SKIPPED = text_preferences.SKIPPED
Data = tuple[Path, list[Sample]]


def change(**changes: Any) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text())
    params["text_preferences"] |= changes
    path.write_text(yaml.safe_dump(params))


@pytest.fixture
def expected(taught: Segmenter, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A clone with the taught model. The records that the rule makes by words alone, as neither a judge nor
    a person here sees the model's masks."""
    for name in (*QUIET, "HF_HUB_OFFLINE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "POPEN_PARENT_RUN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(KEY, "sk-secret")
    monkeypatch.chdir(tmp_path)
    Path(".dvc").mkdir()
    params = yaml.safe_load(PARAMS.read_text())
    params["data"]["root"] = str(data[0])
    params["evaluate"] |= {"batch": 3, "max_new_tokens": 24}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    change(samples=4, temperature=1.2)
    copy.deepcopy(taught).save(text_preferences.MODEL)
    write_index(Path("artifacts/index/preference.jsonl"), data[1])
    pairs, _ = text_preferences.make(
        load(), data[1], lambda a, s, _: first_wrong((said.text, correct(said.text, s)) for said in a)
    )
    assert any(pair.differs for pair in pairs)
    write_records(Path("expected.jsonl"), pairs)
    return Path("expected.jsonl").read_bytes()


def test_people_who_say_what_the_rule_says(expected: bytes, data: Data) -> None:
    cli_corrections.export()
    path = Path("corrections/answers.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    with pytest.raises(CorrectionsError, match=r"answers\.jsonl exists; name another file"):
        cli_corrections.export()

    change(source="people")
    with pytest.raises(SystemExit):  # nothing is filled in yet
        text_preferences.main()
    by_uid = {sample.uid: sample for sample in data[1]}
    for line in lines:
        fix = correct(line["answer"], by_uid[line["uid"]])
        line |= {"corrected": fix.answer, "targets": numbers(fix, by_uid[line["uid"]])}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text_preferences.main()
    assert TEXT_PAIRS.read_bytes() == expected
    assert SKIPPED.read_bytes() == b""

    # one question left out: its pair is missing, the reason is recorded
    kept = [line for line in lines if line["uid"] != data[1][1].uid]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    text_preferences.main()
    assert [pair.uid for pair in read_text_pairs(TEXT_PAIRS)] == [s.uid for s in data[1] if s != data[1][1]]
    skipped = [json.loads(line) for line in SKIPPED.read_text(encoding="utf-8").split("\n")[:-1]]
    assert {skip["uid"] for skip in skipped} == {data[1][1].uid}
    assert all("is not in the file" in skip["reason"] for skip in skipped)


def test_a_judge_that_says_what_the_rule_says(expected: bytes, data: Data) -> None:
    with serving(by_words(data[1])) as endpoint:
        change(source="judge", judge=endpoint.params().model_dump())
        text_preferences.main()
        assert TEXT_PAIRS.read_bytes() == expected
        asked = len(endpoint.requests)
        TEXT_PAIRS.unlink()
        text_preferences.main()  # again: every reply is kept
        assert TEXT_PAIRS.read_bytes() == expected
        assert len(endpoint.requests) == asked
    assert b"sk-secret" not in b"".join(p.read_bytes() for p in Path().rglob("*") if p.is_file())


def test_a_thing_that_is_not_annotated_leaves_the_answer_without_masks(
    expected: bytes, taught: Segmenter, data: Data
) -> None:
    with serving(lambda _: judged("It is the spoon {seg}.", 0)) as endpoint:
        change(source="judge", judge=endpoint.params().model_dump())
        text_preferences.main()
    pairs = list(read_text_pairs(TEXT_PAIRS))
    assert len(pairs) == len(data[1])
    assert not any(pair.known or pair.targets for pair in pairs)
    rows = chosen_rows(pairs)
    assert all(row.masks is None for row in rows)
    from popen.data.images import open_image

    batch = taught.encoder.batch([open_image(data[0], pair.image, 2000) for pair in pairs], rows)
    assert len(batch.row_of_target) == 0
    assert (batch.labels != IGNORED).any(1).all()  # its words still teach


def test_a_judge_that_refuses_everything_is_one_error(
    expected: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda _: completion(None, refusal="No.")) as endpoint:
        change(source="judge", judge=endpoint.params().model_dump())
        with pytest.raises(SystemExit):
            text_preferences.main()
    assert "none of 4 questions has a corrected answer; of the first one: the judge refused: No." in (
        capsys.readouterr().err
    )
    assert not TEXT_PAIRS.exists()


def test_export_needs_a_model(expected: bytes) -> None:
    shutil.rmtree(text_preferences.MODEL)
    with pytest.raises(CorrectionsError, match="artifacts/models/sft is not there; run `dvc repro sft`") as e:
        cli_corrections.export()
    assert explain(e.value) == str(e.value)


def test_an_answer_must_have_room(expected: bytes, data: Data) -> None:
    params = load()
    longer = params.model_copy(
        update={"evaluate": params.evaluate.model_copy(update={"max_new_tokens": 1000})}
    )
    with pytest.raises(ModelError, match=r"evaluate\.max_new_tokens is 1000, .* room for \d+: lower it"):
        text_preferences.make(longer, data[1], rule)
