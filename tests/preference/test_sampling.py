"""Preference data made by a miniature model from drawn images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from popen.masks import decode, encode
from popen.model.batches import Row
from popen.model.generate import Answer
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.params import MaskPreferenceParams, TextPreferenceParams
from popen.parts import Parts
from popen.preference.masks import noise_rectangles
from popen.preference.people import Export
from popen.preference.records import MaskPairs, Skipped, TextPair
from popen.preference.sampling import (
    PairsError,
    mask_pairs,
    read_mask_pairs,
    rule,
    text_pairs,
    write_mask_pairs,
)
from popen.preference.sources import Skip
from popen.preference.text import Correction, correct
from popen.samples import Region, Rle, Sample
from tests.conftest import square

Data = tuple[Path, list[Sample]]
TEXT = TextPreferenceParams(samples=4, temperature=1.2)  # hotter, and most answers are cut off
MASKS = MaskPreferenceParams(
    perturbed=8, rectangles=1, sigma=0.6, side=(0.2, 0.5), margin=0.01, area_ratio=3.0
)


def texts(model: Segmenter, data: Data, seed: int = 0, **changes: object) -> list[TextPair]:
    params = TEXT.model_copy(update=changes)
    made = text_pairs(model, *data, params, batch=3, max_new_tokens=24, max_pixels=2000, seed=seed)
    return [record for record in made if isinstance(record, TextPair)]


@pytest.fixture(scope="module")
def said(taught: Segmenter, data: Data) -> list[TextPair]:
    return texts(taught, data)


def masks(
    model: Segmenter, data: Data, pairs: list[TextPair], stage: str, seed: int = 0, **changes: object
) -> MaskPairs:
    params = MASKS.model_copy(update=changes)
    return mask_pairs(model, data[0], pairs, params, 3, 2000, seed, keep_masks=True)[stage]


def test_answers_are_corrected_by_the_ground_truth(said: list[TextPair], data: Data) -> None:
    assert [pair.uid for pair in said] == [sample.uid for sample in data[1]]
    assert any(pair.differs for pair in said)  # this model has not learned its words by heart
    for pair, sample in zip(said, data[1], strict=True):
        drawn_right = [[float(target == true) for true in sample.targets] for target in pair.targets]
        assert not correct(pair.chosen, sample, drawn_right).changed
        assert pair.chosen.count("{seg}") == len(pair.targets)
        assert {target.name for target in pair.targets} == {target.name for target in sample.targets}
        assert any(pair.chosen_changed + pair.rejected_changed) == pair.differs
        assert (pair.image, pair.question) == (sample.image, sample.question)


def test_reference_values_are_those_of_a_fresh_forward(
    taught: Segmenter, said: list[TextPair], data: Data
) -> None:
    for pair in said:
        for answer, changed, reference in (
            (pair.chosen, pair.chosen_changed, pair.chosen_ref),
            (pair.rejected, pair.rejected_changed, pair.rejected_ref),
        ):
            batch = taught.encoder.batch([Image.open(data[0] / pair.image)], [Row(0, pair.question, answer)])
            with torch.no_grad():
                logps = token_logps(taught(batch).logits, batch)[0]
            tokens = len(taught.encoder.answer_ids(answer))
            assert len(changed) == len(reference) == tokens
            torch.testing.assert_close(torch.tensor(reference), logps[-tokens:], atol=1e-4, rtol=1e-4)


def test_answers_are_drawn_under_the_seed(taught: Segmenter, data: Data, said: list[TextPair]) -> None:
    assert texts(taught, data) == said
    assert [p.rejected for p in texts(taught, data, seed=1)] != [p.rejected for p in said]


def test_the_first_wrong_answer_is_taken_and_a_right_one_where_none_is(taught: Segmenter, data: Data) -> None:
    """Cold, the model says what it was taught; hot, more samples find more mistakes."""
    cold = texts(taught, data, temperature=0.01)
    assert [pair.rejected for pair in cold] == [sample.answer for sample in data[1]]
    assert not any(pair.differs for pair in cold)
    counts = [sum(p.differs for p in texts(taught, data, samples=n, temperature=2.0)) for n in (1, 8)]
    assert counts[0] <= counts[1]
    assert counts[1] > 0


def test_answers_that_are_cut_off_make_no_pairs(taught: Segmenter, data: Data) -> None:
    """Cold, with room for the two short answers alone. Of "It is the cup {seg} and the fork" the rule once
    made a winner with one name twice; people are not asked for the rest of a sentence either."""
    room = len(taught.encoder.answer_ids(data[1][1].answer))
    params = TEXT.model_copy(update={"temperature": 0.01})
    made = list(text_pairs(taught, *data, params, 3, room, 2000, 0))
    pairs = [record for record in made if isinstance(record, TextPair)]
    assert [(pair.uid, pair.rejected) for pair in pairs] == [(s.uid, s.answer) for s in data[1][1::2]]
    skipped = [record for record in made if isinstance(record, Skipped)]
    assert [skip.uid for skip in skipped] == [sample.uid for sample in data[1][::2]]
    assert {skip.reason for skip in skipped} == {"cut off at max_new_tokens"}
    for skip, sample in zip(skipped, data[1][::2], strict=True):
        assert sample.answer.startswith(skip.answer)

    export = Export()
    list(text_pairs(taught, *data, params, 3, room, 2000, 0, export))
    assert [(line.uid, line.answer) for line in export.lines] == [(pair.uid, pair.rejected) for pair in pairs]


def test_of_a_questions_answers_those_that_ended_make_the_pair(taught: Segmenter, data: Data) -> None:
    seen: list[int] = []

    def watched(answers: Sequence[Answer], sample: Sample, skip: Skip) -> tuple[str, Correction] | None:
        assert all(said.ended for said in answers)
        seen.append(len(answers))
        return rule(answers, sample, skip)

    room = len(taught.encoder.answer_ids(data[1][0].answer))
    params = TEXT.model_copy(update={"samples": 8})
    made = list(text_pairs(taught, *data, params, 3, room, 2000, 0, watched))
    assert any(0 < count < 8 for count in seen)
    assert {record.uid for record in made if isinstance(record, TextPair)} == {
        sample.uid for sample, count in zip(data[1], seen, strict=True) if count
    }


def test_the_rule_compares_masks_outside_of_the_ignore_region() -> None:
    """Two cups, and "the left cup" by its mask: the right one, but for pixels that are ignored."""
    cup, other = Region("the red cup", "cup", square(2, 2, 8).rle), square(20, 2, 8)
    ignored = square(0, 12, 20).rle
    logits = torch.from_numpy(decode(cup.rle) | decode(ignored)).float()[None] - 0.5
    said = Answer("It is the left cup {seg}.", [], 0.0, torch.zeros(1, 2, 4), logits)

    def chosen(ignore: Rle | None) -> str:
        things = cup, dataclasses.replace(other, name="the blue cup")
        answer = "It is the red cup {seg}."
        sample = Sample("a", "muse", "train", "", 32, 32, "?", answer, (cup,), things, ignore)
        found = rule([said], sample, print)
        assert found is not None
        return found[1].answer

    assert chosen(None) == "It is the red cup {seg}."
    assert chosen(ignored) == said.text


def test_the_ignore_region_goes_with_the_pair(taught: Segmenter, data: Data, said: list[TextPair]) -> None:
    ignore = square(0, 0, 4).rle
    samples = [dataclasses.replace(sample, ignore=ignore) for sample in data[1]]
    assert [pair.ignore for pair in texts(taught, (data[0], samples))] == [ignore] * len(samples)
    assert [pair.ignore for pair in said] == [None] * len(samples)


def test_mask_pairs_do_not_look_at_ignored_pixels(
    taught: Segmenter, data: Data, said: list[TextPair]
) -> None:
    """What the truth says there changes nothing, and winner and loser do not differ there."""
    ignored = decode(square(0, 0, 9).rle)

    def made(ignore: Rle | None, painted: bool) -> MaskPairs:
        pairs = []
        for pair in said:
            targets = [
                dataclasses.replace(target, rle=encode(decode(target.rle) | (ignored & painted)))
                for target in pair.targets
            ]
            pairs.append(dataclasses.replace(pair, targets=tuple(targets), ignore=ignore))
        return masks(taught, data, pairs, "coarse")

    def same(one: MaskPairs, other: MaskPairs) -> bool:
        values = zip(one._tensors().values(), other._tensors().values(), strict=True)
        return (one.uids, one.targets) == (other.uids, other.targets) and all(
            torch.equal(a, b) for a, b in values
        )

    plain = made(encode(ignored), painted=False)
    assert same(plain, made(encode(ignored), painted=True))
    assert not same(made(None, painted=False), made(None, painted=True))
    assert same(made(encode(ignored & False), painted=False), made(None, painted=False))
    region = torch.from_numpy(ignored)
    assert not (plain.winner_masks | plain.loser_masks)[:, region].any()
    assert (plain.reference_masks[:, region] > 0).any()  # the model draws there
    truth = {(pair.uid, n): decode(t.rle) & ~ignored for pair in said for n, t in enumerate(pair.targets)}
    for number, key in enumerate(zip(plain.uids, plain.targets, strict=True)):
        true = torch.from_numpy(truth[key])
        for mask, iou in zip((plain.winner_masks, plain.loser_masks), plain.ious[number], strict=False):
            expected = int((mask[number] & true).sum()) / int((mask[number] | true).sum())
            assert float(iou) == pytest.approx(expected)


def test_mask_pairs_hold_what_the_perturbed_images_give(
    taught: Segmenter, data: Data, said: list[TextPair]
) -> None:
    """Each winner and loser is found again among the eight views, and beats and loses as ranked."""
    pairs = masks(taught, data, said, "coarse")
    assert len(pairs) > 0
    winner, loser, clean = pairs.ious.T
    assert (winner > clean).all()
    assert (winner - loser >= MASKS.margin - 1e-6).all()
    areas = pairs.winner_masks.flatten(1).sum(1), pairs.loser_masks.flatten(1).sum(1)
    ratio = torch.maximum(*areas) / torch.minimum(*areas)
    assert (ratio <= MASKS.area_ratio).all()
    by_uid = {pair.uid: pair for pair in said}
    for number, (uid, target) in enumerate(zip(pairs.uids, pairs.targets, strict=True)):
        start = 3 * ([pair.uid for pair in said].index(uid) // 3)  # batches of three, each with its seed
        part = said[start : start + 3]
        rows = [
            Row(i, pair.question, pair.chosen, [decode(t.rle) for t in pair.targets])
            for i, pair in enumerate(part)
        ]
        batch = taught.encoder.batch([Image.open(data[0] / pair.image) for pair in part], rows)
        place = [pair.uid for pair in part].index(uid)
        at = batch.row_of_target.tolist().index(place) + target
        views = noise_rectangles(
            batch.images, 8, 1, MASKS.sigma, MASKS.side, torch.Generator().manual_seed(start)
        )
        with torch.no_grad():
            seen = [taught(batch.with_images(views[copy::8])) for copy in range(8)]
            whole = taught(batch)
        found = [torch.allclose(view.embeddings[at], pairs.winner[number], atol=1e-4) for view in seen]
        assert sum(found) == 1
        assert torch.equal(seen[found.index(True)].masks[at] > 0, pairs.winner_masks[number])
        assert any(torch.allclose(view.embeddings[at], pairs.loser[number], atol=1e-4) for view in seen)
        torch.testing.assert_close(pairs.reference[number], whole.embeddings[at], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            pairs.reference_masks[number].float(), whole.masks[at], atol=2e-2, rtol=2e-3
        )
        truth = torch.from_numpy(decode(by_uid[uid].targets[target].rle))
        mask = pairs.winner_masks[number]
        assert float(winner[number]) == pytest.approx(int((mask & truth).sum()) / int((mask | truth).sum()))


def test_the_fine_stage_has_other_losers(taught: Segmenter, data: Data, said: list[TextPair]) -> None:
    coarse, fine = (masks(taught, data, said, stage) for stage in ("coarse", "fine"))
    low = dict(zip(zip(coarse.uids, coarse.targets, strict=True), coarse.ious, strict=True))
    assert len(fine) > 0
    for uid, target, iou in zip(fine.uids, fine.targets, fine.ious, strict=True):
        assert torch.equal(iou[[0, 2]], low[uid, target][[0, 2]])  # the same winner and clean mask
        assert iou[1] > low[uid, target][1]  # a medium, better than the low of the coarse stage


def test_pairs_for_the_embedding_form_hold_no_masks(
    taught: Segmenter, data: Data, said: list[TextPair], tmp_path: Path
) -> None:
    with_masks = masks(taught, data, said, "coarse")
    without = mask_pairs(taught, data[0], said, MASKS, 3, 2000, 0, keep_masks=False)["coarse"]
    without.save(tmp_path)
    again = MaskPairs.load(tmp_path)
    assert again.uids == with_masks.uids
    for name, value in again._tensors().items():
        if name.endswith("_masks"):
            assert value.shape == (len(again), 0, 0)
        else:
            assert torch.equal(value, getattr(with_masks, name))


def test_pairs_that_are_kept_on_the_disk_hold_nothing_else(
    taught: Segmenter, data: Data, said: list[TextPair], tmp_path: Path
) -> None:
    """Not the whole batch of which they are views."""
    parts = Parts(tmp_path / "parts", write_mask_pairs, read_mask_pairs)
    mask_pairs(taught, data[0], said, MASKS, 3, 2000, 0, keep_masks=True, parts=parts)
    files = sorted((tmp_path / "parts").iterdir())
    assert files
    for file in files:
        kept = [value for pair in read_mask_pairs(file) for value in pair.values.values()]
        assert kept
        for value in kept:
            assert value.untyped_storage().nbytes() == value.nbytes


def test_mask_pairs_obey_their_seed(taught: Segmenter, data: Data, said: list[TextPair]) -> None:
    first, again, other = (masks(taught, data, said, "coarse", seed) for seed in (0, 0, 1))
    assert torch.equal(first.winner, again.winner)
    assert first.uids == again.uids
    assert len(first) != len(other) or not torch.equal(first.winner, other.winner)


def test_no_pair_at_all_says_what_to_turn(taught: Segmenter, data: Data, said: list[TextPair]) -> None:
    with pytest.raises(
        PairsError, match=r"mask_preferences: no target gives a pair \(coarse\); raise .*sigma"
    ):
        masks(taught, data, said, "coarse", sigma=1e-9)
    none = [dataclasses.replace(pair, targets=()) for pair in said]
    with pytest.raises(PairsError, match="no target gives a pair"):
        masks(taught, data, none, "coarse")
