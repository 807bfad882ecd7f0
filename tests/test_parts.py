"""Batches shared among processes and kept: the records of one process, in its order, and none made twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from popen.evaluation.answering import Timed, answer_batch, prediction
from popen.evaluation.benchmark import rows, summarise
from popen.evaluation.prediction import Prediction, read_predictions, write_predictions
from popen.model.segmenter import Segmenter
from popen.params import EvaluateParams
from popen.parts import Parts, in_batches
from popen.preference.records import read_records, write_records
from popen.preference.sampling import mask_pairs, read_mask_pairs, text_pairs, write_mask_pairs
from popen.samples import Sample
from tests.preference.test_sampling import MASKS, TEXT, texts
from tests.processes import together

Data = tuple[Path, list[Sample]]
NUMBERS = range(0, 35, 5)


def kept(folder: Path) -> Parts[Any]:
    return Parts(
        folder,
        lambda path, records: path.write_text(json.dumps(records)),
        lambda path: json.loads(path.read_text()),
    )


def tens(number: int) -> Iterator[int]:
    yield from range(10 * number, 10 * number + 1 + number % 2)  # one or two records a batch


EXPECTED = [record for number in NUMBERS for record in tens(number)]


def test_each_batch_is_made_once_and_all_come_in_order(tmp_path: Path) -> None:
    assert list(in_batches(NUMBERS, tens, "test", None)) == EXPECTED

    def work() -> tuple[list[int], list[int]]:
        made: list[int] = []

        def make(number: int) -> Iterator[int]:
            made.append(number)
            return tens(number)

        return made, list(in_batches(NUMBERS, make, "test", kept(tmp_path)))

    for count in (1, 2, 3):
        told = together(work, count, grouped=False)
        assert [records for _, records in told] == [EXPECTED] + [[]] * (count - 1)
        assert sorted(number for made, _ in told for number in made) == list(NUMBERS)
        assert max(len(made) for made, _ in told) <= -(-len(NUMBERS) // count)
        kept(tmp_path).clear()
        assert not tmp_path.exists()


def test_a_killed_process_made_what_it_wrote(tmp_path: Path) -> None:
    """By another number of processes the rest is made, and nothing that was whole is made again."""

    def slowly(number: int) -> Iterator[int]:
        time.sleep(0.2)
        return tens(number)

    def target() -> None:
        list(in_batches(NUMBERS, slowly, "test", kept(tmp_path)))

    process = get_context("fork").Process(target=target)
    process.start()
    while not kept(tmp_path).file(10).exists():
        assert process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (tmp_path / "batch-00000030.writing").write_text("[1, 2")  # what a write that was cut off leaves
    whole = {number for number in NUMBERS if kept(tmp_path).file(number).exists()}
    assert whole < set(NUMBERS)

    def work() -> tuple[list[int], list[int]]:
        made: list[int] = []

        def make(number: int) -> Iterator[int]:
            made.append(number)
            return tens(number)

        return made, list(in_batches(NUMBERS, make, "test", kept(tmp_path)))

    (made, records), (others, _) = together(work, grouped=False)
    assert records == EXPECTED
    assert sorted(made + others) == sorted(set(NUMBERS) - whole)


def test_what_was_there_and_is_gone_is_made_again(tmp_path: Path) -> None:
    """A process that is alone waits for nobody: it once hung when another removed what it had counted on."""
    first = kept(tmp_path).file(NUMBERS[0])
    kept(tmp_path).save(NUMBERS[0], list(tens(NUMBERS[0])))

    def make(number: int) -> Iterator[int]:
        if number == NUMBERS[-1]:
            first.unlink()
        return tens(number)

    assert list(in_batches(NUMBERS, make, "test", kept(tmp_path))) == EXPECTED
    assert first.exists()


def test_who_comes_late_makes_nothing_again(tmp_path: Path) -> None:
    """All was there, the main process wrote the result and cleared the folder while the other loaded its
    model: that one once made its whole share again, and left it there."""
    for number in NUMBERS:
        kept(tmp_path).save(number, list(tens(number)))

    def work() -> tuple[list[int], list[int]]:
        parts, made = kept(tmp_path), list[int]()

        def make(number: int) -> Iterator[int]:
            made.append(number)
            return tens(number)

        while os.environ["RANK"] == "1" and tmp_path.exists():
            time.sleep(0.05)
        records = list(in_batches(NUMBERS, make, "test", parts))
        if os.environ["RANK"] == "0":
            time.sleep(1.0)  # until the other has looked at what there is
            parts.clear()
        return made, records

    assert together(work, grouped=False) == [([], EXPECTED), ([], [])]
    assert not tmp_path.exists()


def test_two_processes_make_the_preference_data_and_answers_of_one(
    taught: Segmenter, data: Data, tmp_path: Path
) -> None:
    root, samples = data
    texts_one = texts(taught, data)
    masks_one = mask_pairs(taught, root, texts_one, MASKS, 3, 2000, 0, keep_masks=True)
    params = EvaluateParams(batch=3, max_new_tokens=24, bootstrap=10)
    told = predictions_of(
        one
        for start in (0, 3)
        for one in answer_batch(taught, root, samples[start : start + 3], params, 2000)
    )

    def work() -> Any:
        parts = Parts(tmp_path / "text", write_records, read_records)
        pairs = list(text_pairs(taught, root, samples, TEXT, 3, 24, 2000, 0, parts=parts))
        masks = Parts(tmp_path / "masks", write_mask_pairs, read_mask_pairs)
        ranked = mask_pairs(taught, root, texts_one, MASKS, 3, 2000, 0, keep_masks=True, parts=masks)
        predictions = Parts(tmp_path / "answers", write_predictions, read_predictions)

        def predict(start: int) -> list[Prediction]:
            return predictions_of(answer_batch(taught, root, samples[start : start + 3], params, 2000))

        return pairs, ranked, list(in_batches(range(0, 4, 3), predict, "test", predictions))

    (pairs, ranked, said), helper = together(work, grouped=False)
    assert pairs == texts_one
    assert helper == ([], {}, [])
    assert len(masks_one["coarse"]) > 0
    for stage, expected in masks_one.items():
        assert (ranked[stage].uids, ranked[stage].targets) == (expected.uids, expected.targets)
        for name, value in expected._tensors().items():
            assert torch.equal(getattr(ranked[stage], name), value)
    assert said == told
    assert summarise(rows(samples, said)) == summarise(rows(samples, told))


def predictions_of(answered: Iterable[Timed]) -> list[Prediction]:
    return [prediction(sample, answer, 0.0, 1.0) for sample, answer, _ in answered]


def test_helpers_make_what_one_process_makes(tmp_path: Path) -> None:
    """Forked helpers do their share each; the records come in order and once."""
    makers = tmp_path / "makers"
    makers.mkdir()

    def make(number: int) -> Iterator[int]:
        (makers / f"{number}-{os.getpid()}").touch()
        return tens(number)

    for cores in (1, 2, 3, 20):
        parts = replace(kept(tmp_path / "parts"), cores=cores)
        assert list(in_batches(NUMBERS, make, "test", parts)) == EXPECTED
        made = [name.name.split("-") for name in makers.iterdir()]
        assert sorted(int(number) for number, _ in made) == list(NUMBERS)
        shares = Counter(pid for _, pid in made)
        assert len(shares) == min(cores, len(NUMBERS))
        assert max(shares.values()) == -(-len(NUMBERS) // len(shares))
        assert str(os.getpid()) in shares
        assert list(in_batches(NUMBERS, make, "test", parts)) == EXPECTED  # nothing is made again
        assert len(list(makers.iterdir())) == len(NUMBERS)
        parts.clear()
        for file in makers.iterdir():
            file.unlink()


def test_what_a_helper_cannot_make_fails_in_the_stage_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its own words and once; the others' batches are kept, and no process is left behind."""
    parts, before = replace(kept(tmp_path), cores=2), psutil.Process().children()

    def make(number: int) -> Iterator[int]:
        if number == NUMBERS[3]:  # a helper's second
            raise ValueError("no such picture")
        return tens(number)

    with pytest.raises(ValueError, match="no such picture"):
        list(in_batches(NUMBERS, make, "test", parts))
    assert "Traceback" not in capfd.readouterr().err
    assert parts.file(NUMBERS[1]).exists()
    assert not parts.file(NUMBERS[3]).exists()
    assert list(in_batches(NUMBERS, tens, "test", parts)) == EXPECTED

    def killed(number: int) -> Iterator[int]:
        if number == NUMBERS[3] and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
        return tens(number)

    main = os.getpid()
    parts.clear()
    assert list(in_batches(NUMBERS, killed, "test", parts)) == EXPECTED

    def stopped(number: int) -> Iterator[int]:
        if number == NUMBERS[0]:
            raise KeyboardInterrupt
        time.sleep(60)
        return tens(number)

    parts.clear()
    with pytest.raises(KeyboardInterrupt):
        list(in_batches(NUMBERS, stopped, "test", parts))
    assert psutil.Process().children() == before


def test_helpers_die_with_the_process_that_forked_them(tmp_path: Path) -> None:
    def make(number: int) -> Iterator[int]:
        (tmp_path / f"pid-{os.getpid()}").touch()
        time.sleep(60)
        return tens(number)

    process = get_context("fork").Process(
        target=lambda: list(in_batches(NUMBERS, make, "test", replace(kept(tmp_path / "parts"), cores=2)))
    )
    process.start()
    while len(found := list(tmp_path.glob("pid-*"))) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    pids = [int(file.name.removeprefix("pid-")) for file in found]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
