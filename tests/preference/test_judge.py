"""The judge behind a real server on loopback, through the real client library."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from popen.model.generate import Answer
from popen.params import JudgeParams
from popen.preference.judge import KEY, Judge, JudgeError
from popen.preference.records import Skipped
from popen.samples import Sample, write_index
from tests.preference.endpoint import SOON, Reply, asked, completion, failed, judged, serving

Data = tuple[Path, list[Sample]]
SAID = "It is the cup {seg} and the knife {seg}."
RIGHT = "It is the cup {seg}."


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(KEY, "sk-secret")


def said(*texts: str) -> list[Answer]:
    return [Answer(text, [], 0.0, torch.zeros(0, 2, 4), torch.zeros(0, 8, 8)) for text in texts]


def make(params: JudgeParams, data: Data, kept: Path) -> tuple[Judge, list[Skipped]]:
    skipped: list[Skipped] = []
    return Judge(params, data[0], 2000, kept), skipped


def test_the_judge_sees_image_question_answer_and_truth(data: Data, tmp_path: Path) -> None:
    sample = data[1][1]  # asks for the cup; the fork beside it is annotated, too
    with serving(lambda _: judged(f" {RIGHT}\n", 1)) as endpoint:
        judge, skipped = make(endpoint.params(), data, tmp_path)
        found = judge(said(SAID), sample, skipped.append)
    assert found is not None
    text, correction = found
    assert (text, correction.answer, correction.targets) == (SAID, RIGHT, sample.targets)
    assert correction.changed
    assert not skipped
    (request,) = endpoint.requests
    assert endpoint.keys == ["Bearer sk-secret"]
    assert request["model"] == "judge"
    assert request["response_format"]["type"] == "json_schema"
    schema = request["response_format"]["json_schema"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["answer", "targets"], False)
    told = asked(request)
    assert (told["question"], told["model's answer"]) == (sample.question, SAID)
    assert told["data set's answer"] == sample.answer
    assert told["image"] == {"width": 32, "height": 32}
    # as tests/conftest.py draws them
    assert told["annotated"] == [
        {"number": 1, "name": "the cup", "asked_for": True, "box": [6, 2, 10, 10]},
        {"number": 2, "name": "the fork", "asked_for": False, "box": [18, 17, 9, 9]},
    ]
    head, _, data_url = request["messages"][1]["content"][1]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data_url)))
    assert ImageChops.difference(sent, Image.open(data[0] / sample.image)).getbbox() is None
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert b"sk-secret" not in kept


def test_the_first_wrong_answer_is_taken_and_no_more_are_judged(data: Data, tmp_path: Path) -> None:
    replies = {RIGHT: judged(RIGHT, 1), SAID: judged(RIGHT, 1), "A cup {seg}.": judged(RIGHT, 1)}
    with serving(lambda request: replies[asked(request)["model's answer"]]) as endpoint:
        judge, skipped = make(endpoint.params(), data, tmp_path)
        found = judge(said(RIGHT, RIGHT, SAID, "A cup {seg}."), data[1][1], skipped.append)
        assert found is not None
        assert found[0] == SAID
        assert len(endpoint.requests) == 2
        unchanged = judge(said(RIGHT), data[1][1], skipped.append)
        assert unchanged is not None
        assert not unchanged[1].changed
        assert len(endpoint.requests) == 2  # kept


def test_a_busy_and_a_broken_endpoint_are_tried_again(data: Data, tmp_path: Path) -> None:
    replies = iter([failed(429), failed(500), judged(RIGHT, 1)])
    with serving(lambda _: next(replies)) as endpoint:
        judge, skipped = make(endpoint.params(), data, tmp_path)
        assert judge(said(SAID), data[1][1], skipped.append) is not None
    assert len(endpoint.requests) == 3
    assert judge.used() == (1, 10)
    assert not skipped


REASONS = [  # reply, reason, whether there is a reply at all: one that is kept and not asked for again
    (completion("{'answer': "), "does not fit the format: Invalid JSON", True),
    (completion('{"answer": "x"}'), "does not fit the format: targets: Field required", True),
    (completion('{"answer": "x", "targets": [], "note": 1}'), "note: Extra inputs", True),
    (completion(None), "does not fit the format", True),
    (completion(None, refusal="I cannot look at this."), "the judge refused: I cannot look at this.", True),
    (completion('{"answer": "It', finish="length"), "cut off (length)", True),
    (completion("", finish="content_filter"), "cut off (content_filter)", True),
    (judged("It is the cup."), "", True),  # fits: no mask at all is a correction, too
    (judged(RIGHT, 1, 2), "has 1 {seg}, but 2 targets", True),
    (judged(RIGHT, 3), "target 3: the things annotated have the numbers 1 to 2", True),
    (judged(RIGHT, -1), "target -1", True),
    (judged("The <image> {seg}.", 1), "holds '<image>', which is no word", True),
    (judged(" "), "is empty", True),
    ((200, {}, b"{broken"), "sent no chat completion: Invalid JSON", True),
    ((200, {"Content-Type": "text/html"}, b"<p>login</p>"), "sent no chat completion", True),
    ((200, {}, b'{"choices": []}'), "sent no chat completion: choices: List should have", True),
    (completion([{"type": "text", "text": "x"}]), "choices.0.message.content: Input should be a valid", True),
    (failed(400, "content policy"), "refused the request: Error code: 400", False),
]


@pytest.mark.parametrize(("reply", "reason", "kept"), REASONS, ids=[reason for _, reason, _ in REASONS])
def test_what_is_no_correction_is_skipped_with_its_reason(
    data: Data, tmp_path: Path, reply: Reply, reason: str, kept: bool
) -> None:
    """The question's next answer is judged; nothing takes the place of the skipped one."""
    with serving(lambda r: reply if asked(r)["model's answer"] == SAID else judged(RIGHT, 1)) as endpoint:
        for _ in range(2):  # a stage that is started again
            judge, skipped = make(endpoint.params(), data, tmp_path)
            found = judge(said(SAID, "A cup {seg}."), data[1][1], skipped.append)
            assert found is not None
            if not reason:
                assert (found[0], found[1].targets) == (SAID, ())
                continue
            assert found[0] == "A cup {seg}."
            (skip,) = skipped
            assert (skip.uid, skip.answer) == (data[1][1].uid, SAID)
            assert reason in skip.reason
            assert judge(said(SAID), data[1][1], skipped.append) is None
    times = sum(asked(request)["model's answer"] == SAID for request in endpoint.requests)
    assert times == (1 if kept else 4)


@pytest.mark.parametrize("budget", [{"requests": 2}, {"tokens": 11}])
def test_a_spent_budget_ends_the_judging_and_keeps_it(
    data: Data, tmp_path: Path, budget: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the stage starts again: what was paid for counts."""
    name, most = next(iter(budget.items()))
    with serving(lambda _: judged(RIGHT, 1)) as endpoint:
        for _ in range(2):
            judge, skipped = make(endpoint.params(**budget), data, tmp_path)
            found = [judge(said(SAID), sample, skipped.append) for sample in data[1]]
            assert [pair is not None for pair in found] == [True, True, False, False]
            assert [skip.uid for skip in skipped] == [sample.uid for sample in data[1][2:]]
            reason = f"the judge's budget of {most} {name} is spent; raise text_preferences.judge.{name}"
            assert all(skip.reason.startswith(reason) for skip in skipped)
            assert capsys.readouterr().out.count(reason) == 1
        assert len(endpoint.requests) == 2
        judge, skipped = make(endpoint.params(), data, tmp_path)
        assert all(judge(said(SAID), sample, skipped.append) for sample in data[1])
    assert len(endpoint.requests) == 4
    assert not skipped


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        (completion([{"type": "text", "text": "x"}], tokens=7), 14),
        ((200, {}, b'{"choices": [], "usage": {"total_tokens": 7}}'), 14),
        ((200, {}, b"<p>login</p>"), 0),
        ((200, {}, b""), 0),
    ],
)
def test_replies_that_cannot_be_read_are_paid_for_and_count(
    data: Data, tmp_path: Path, reply: Reply, tokens: int
) -> None:
    with serving(lambda _: reply) as endpoint:
        for _ in range(2):  # a stage that is started again
            judge, skipped = make(endpoint.params(requests=2), data, tmp_path)
            assert [judge(said(SAID), sample, skipped.append) for sample in data[1]] == [None] * 4
            assert ["sent no chat completion" in skip.reason for skip in skipped] == [
                True,
                True,
                False,
                False,
            ]
            assert "budget of 2 requests is spent" in skipped[-1].reason
            assert judge.used() == (2, tokens)
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": None}, {"total_tokens": -3}, "free"])
def test_a_reply_that_does_not_tell_its_tokens_is_used(data: Data, tmp_path: Path, usage: object) -> None:
    body = json.loads(judged(RIGHT, 1)[2]) | {"usage": usage}
    with serving(lambda _: (200, {}, json.dumps(body).encode())) as endpoint:
        for _ in range(2):
            judge, skipped = make(endpoint.params(), data, tmp_path)
            found = judge(said(SAID), data[1][1], skipped.append)
            assert found is not None
            assert found[1].answer == RIGHT
            assert judge.used() == (1, 0)
    assert len(endpoint.requests) == 1


def test_another_model_question_answer_or_image_is_asked_anew(data: Data, tmp_path: Path) -> None:
    first, second = data[1][1], data[1][3]
    with serving(lambda _: judged(RIGHT, 1)) as endpoint:
        for params, text, sample in (
            (endpoint.params(), SAID, first),
            (endpoint.params(model="other"), SAID, first),
            (endpoint.params(), "A cup {seg}.", first),
            (endpoint.params(), SAID, second),
            (endpoint.params(retries=0, timeout=9.0, requests=7), SAID, first),  # shapes no reply
        ):
            make(params, data, tmp_path)[0](said(text), sample, print)
    assert len(endpoint.requests) == 4


KILLED = """
import json, sys
from pathlib import Path
from popen.params import JudgeParams
from popen.preference.judge import Judge
from popen.samples import read_index
params, root, kept, index, text = sys.argv[1:]
judge = Judge(JudgeParams.model_validate_json(params), Path(root), 2000, Path(kept))
for sample in read_index(Path(index)):
    judge.correct(text, sample)
"""


def test_a_killed_judging_does_not_ask_twice(data: Data, tmp_path: Path) -> None:
    """Killed while the third reply is on its way: the two before are kept, the third is asked for again."""
    write_index(tmp_path / "index.jsonl", data[1])
    third, go_on = Event(), Event()

    def reply(request: dict[str, Any]) -> Reply:
        if len(endpoint.requests) == 3:
            third.set()
            go_on.wait(60)
        return judged(RIGHT, 1)

    kept = tmp_path / "kept"
    with serving(reply) as endpoint:
        words = [endpoint.params().model_dump_json(), data[0], kept, tmp_path / "index.jsonl", SAID]
        process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, words)])
        try:
            assert third.wait(120)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            go_on.set()
        assert len(list(kept.rglob("*.json"))) == 2
        judge, skipped = make(endpoint.params(), data, kept)
        again = [judge.correct(SAID, sample) for sample in data[1]]
    assert [correction.answer for correction in again] == [RIGHT] * 4
    assert not skipped
    seen = [json.dumps(asked(request)) for request in endpoint.requests]
    assert [seen.count(text) for text in dict.fromkeys(seen)] == [1, 1, 2, 1]
    assert judge.used() == (4, 40)


def test_no_key_and_a_wrong_key_say_what_to_do(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda _: failed(401, "Incorrect API key provided: sk-secret")) as endpoint:
        judge, skipped = make(endpoint.params(), data, tmp_path)
        with pytest.raises(JudgeError, match=rf"refuses the key in {KEY} \(HTTP 401\)") as caught:
            judge(said(SAID), data[1][1], skipped.append)
        assert "sk-secret" not in str(caught.value)
        monkeypatch.delenv(KEY)
        with pytest.raises(JudgeError, match=rf"source is judge, and {KEY} is not set"):
            make(endpoint.params(), data, tmp_path)


@pytest.mark.parametrize("reply", [failed(404, "no such model"), failed(503), (429, SOON, b"slow down")])
def test_an_endpoint_that_does_not_answer_ends_the_judging(data: Data, tmp_path: Path, reply: Reply) -> None:
    with serving(lambda _: reply) as endpoint:
        judge, skipped = make(endpoint.params(retries=1), data, tmp_path)
        with pytest.raises(JudgeError, match=rf"judge at {endpoint.url} does not answer \(.*what was judged"):
            judge(said(SAID), data[1][1], skipped.append)
    assert len(endpoint.requests) == (1 if reply[0] == 404 else 2)
    assert not skipped
    with pytest.raises(JudgeError, match="Connection error"):  # the server is gone
        make(endpoint.params(retries=0), data, tmp_path)[0](said(SAID), data[1][1], print)
