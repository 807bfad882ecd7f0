"""A file of corrections that people filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from popen.preference.people import Corrections, CorrectionsError, Export, Line
from popen.preference.records import Skipped
from popen.samples import Sample
from tests.preference.test_judge import said

Data = tuple[Path, list[Sample]]
SAID = "It is the cup {seg} and the knife {seg}."
RIGHT = "It is the cup {seg}."


def line(number: int = 1, **changes: Any) -> str:
    fields = {"uid": f"muse/train/{number}/0", "answer": SAID, "corrected": RIGHT, "targets": [1]}
    return json.dumps(fields | changes) + "\n"


def read(path: Path, data: Data, *lines: str) -> tuple[Corrections, list[Skipped]]:
    path.write_text("".join(lines), encoding="utf-8")
    skipped: list[Skipped] = []
    return Corrections.read(path, data[1]), skipped


def test_what_is_written_for_people_comes_back_filled_in(data: Data, tmp_path: Path) -> None:
    sample, path = data[1][1], tmp_path / "new" / "answers.jsonl"
    export = Export()
    export(said(SAID, "Nothing.\u2028", SAID), sample, print)
    export.write(path)
    with pytest.raises(FileExistsError):  # somebody may have begun to fill it in
        export.write(path)
    first, second = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert (first["uid"], first["answer"], first["corrected"]) == (sample.uid, SAID, None)
    assert (first["image"], first["question"]) == (sample.image, sample.question)
    assert [(thing["number"], thing["name"]) for thing in first["known"]] == [(1, "the cup"), (2, "the fork")]
    assert set(first) == set(Line.model_fields)

    filled = first | {"corrected": "It is the cup {seg} and the fork {seg}.", "targets": [1, 2]}
    source, skipped = read(path, data, json.dumps(filled) + "\n", json.dumps(second) + "\n")
    found = source(said("Nothing.\u2028", SAID), sample, skipped.append)
    assert found is not None
    assert (found[0], found[1].answer) == (SAID, filled["corrected"])
    assert found[1].targets == sample.objects
    (skip,) = skipped
    assert (skip.uid, skip.answer, skip.reason) == (
        sample.uid,
        "Nothing.\u2028",
        f"{path}: line 2: not corrected yet",
    )


def test_a_wrong_answer_goes_before_a_right_one_and_one_is_enough(data: Data, tmp_path: Path) -> None:
    lines = line(answer=RIGHT), line(), line(2, corrected="The knife {seg}.", targets=[0])
    source, skipped = read(tmp_path / "a.jsonl", data, *lines)
    found = source(said(RIGHT, SAID), data[1][1], skipped.append)
    assert found is not None
    assert (found[0], found[1].changed) == (SAID, True)
    unknown = source(said(SAID), data[1][2], skipped.append)
    assert unknown is not None
    assert (unknown[1].answer, unknown[1].targets) == ("The knife {seg}.", ())  # no mask is known for it
    assert source(said(SAID), data[1][3], skipped.append) is None
    assert [(skip.uid, skip.reason) for skip in skipped] == [
        (data[1][3].uid, f"{tmp_path / 'a.jsonl'}: is not in the file")
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (line(9), "no question of the role `preference` has the uid 'muse/train/9/0'"),
        (line(targets=[1, 2]), "the corrected answer has 1 {seg}, but 2 targets"),
        (line(targets=None), "the corrected answer has 1 {seg}, but 0 targets"),
        (line(targets=[7]), "target 7: the things annotated have the numbers 1 to 2"),
        (line(targets=["1"]), "targets.0: Input should be a valid integer"),
        (line(corrected=""), "the corrected answer is empty"),
        (line(corected="x"), "corected: Extra inputs are not permitted"),
        (line(2), "the answer is in line 1, too"),
        ("\n", "is empty; remove it"),
        ('{"uid": 3', "Invalid JSON"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_by_number(
    data: Data, tmp_path: Path, bad: str, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(CorrectionsError) as caught:
        read(path, data, line(2), bad, line(3))
    assert str(caught.value).startswith(f"{path}, line 2: {reason}")
    assert "\n" not in str(caught.value)
    assert "at line" not in str(caught.value)  # a second number, of nothing that the reader sees


def test_all_that_is_wrong_is_said_at_once_but_not_without_end(data: Data, tmp_path: Path) -> None:
    with pytest.raises(CorrectionsError) as caught:
        read(tmp_path / "a.jsonl", data, *[line(number) for number in range(30, 43)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[9].startswith(f"{tmp_path / 'a.jsonl'}, line 10: ")
    assert lines[10] == "and 3 more"
    with pytest.raises(CorrectionsError, match=r"none\.jsonl: no such file; `popen corrections export`"):
        Corrections.read(tmp_path / "none.jsonl", data[1])


def test_an_answer_that_was_not_sampled_is_refused(data: Data, tmp_path: Path) -> None:
    source, skipped = read(tmp_path / "a.jsonl", data, line(2), line())
    with pytest.raises(CorrectionsError, match=r"a\.jsonl, line 2: 'It is .* is not among the answers"):
        source(said(RIGHT), data[1][1], skipped.append)
