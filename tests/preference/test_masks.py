"""Perturbed images and the pairs made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from popen.preference.masks import Ranks, noise_rectangles, rank


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 2, height: int = 32, width: int = 40) -> Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(9))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.5), st.floats(0.0, 0.5))
def test_noise_stays_inside_one_rectangle_of_the_size_asked_for(seed: int, low: float, more: float) -> None:
    clean = torch.full((2, 3, 32, 40), 0.5)
    noisy = noise_rectangles(clean, 3, 1, 0.3, (low, low + more), seeded(seed))
    assert noisy.shape == (6, 3, 32, 40)
    for changed in (noisy != clean[0]).any(1):
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()  # one filled rectangle, in all three channels together
        for side, size in zip(box.shape, (32, 40), strict=True):
            assert low * size - 0.5 <= side <= (low + more) * size + 0.5


def test_pixels_outside_are_those_of_the_image_and_inside_stay_in_range() -> None:
    clean = images()
    noisy = noise_rectangles(clean, 2, 1, 5.0, (0.3, 0.3), seeded())
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    same = (noisy == clean.repeat_interleave(2, 0)).all(1).float().mean((1, 2))
    assert (same > 0.85).all()  # 0.3 x 0.3 of the area is noisy
    assert (same < 0.95).all()


def test_copies_of_an_image_are_adjacent_and_differ() -> None:
    clean = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    noisy = noise_rectangles(clean, 3, 1, 0.5, (0.2, 0.5), seeded())
    assert [round(image.median().item()) for image in noisy] == [0, 0, 0, 1, 1, 1]
    assert len({tuple((image != image.median()).any(0).flatten().tolist()) for image in noisy[:3]}) == 3


def test_noise_has_the_strength_asked_for() -> None:
    clean = torch.full((1, 3, 200, 200), 0.5)
    noisy = noise_rectangles(clean, 1, 1, 0.05, (1.0, 1.0), seeded())
    assert (noisy - clean).std().item() == pytest.approx(0.05, rel=0.02)
    assert (noisy - clean).mean().item() == pytest.approx(0.0, abs=0.001)


def test_rectangles_reach_every_corner_and_more_of_them_cover_more() -> None:
    clean = torch.full((1, 3, 16, 16), 0.5)

    def changed(count: int) -> Tensor:
        return (noise_rectangles(clean, 300, count, 0.3, (0.2, 0.3), seeded()) != clean).any(1).float()

    hit = changed(1).mean(0)
    assert min(hit[0, 0], hit[0, -1], hit[-1, 0], hit[-1, -1]) > 0
    assert changed(4).mean() > 2 * changed(1).mean()


def test_one_seed_one_result() -> None:
    args = (images(), 2, 2, 0.6, (0.2, 0.5))
    assert torch.equal(noise_rectangles(*args, seeded(3)), noise_rectangles(*args, seeded(3)))
    assert not torch.equal(noise_rectangles(*args, seeded(3)), noise_rectangles(*args, seeded(4)))
    state = torch.random.get_rng_state()
    noise_rectangles(*args, seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched


def test_normalised_images_and_impossible_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="before the vision tower's normalisation"):
        noise_rectangles(images() * 4 - 2, 1, 1, 0.5, (0.2, 0.5), seeded())
    for side in ((0.0, 0.5), (0.5, 0.2), (0.5, 1.5)):
        with pytest.raises(ValueError, match="sides of a rectangle"):
            noise_rectangles(images(), 1, 1, 0.5, side, seeded())


def test_no_images_give_no_copies() -> None:
    assert noise_rectangles(torch.zeros(0, 3, 8, 8), 4, 1, 0.5, (0.2, 0.5), seeded()).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("ious", "areas", "clean", "expected"),
    [
        # middle of .8 and .2 is .5: candidate 3 is nearer than candidate 1
        ([0.2, 0.7, 0.8, 0.45], [100] * 4, None, Ranks(high=2, low=0, medium=3)),
        # candidate 1 is too near to the winner to be a medium
        ([0.2, 0.75, 0.8], [100] * 3, None, Ranks(high=2, low=0, medium=None)),
        # the worst has twice the winner's area: the next worst is the loser
        ([0.2, 0.4, 0.8, 0.6], [200, 110, 100, 95], None, Ranks(high=2, low=1, medium=3)),
        # the best has no rival of its area: the second best wins
        ([0.9, 0.8, 0.3], [300, 100, 110], None, Ranks(high=1, low=2, medium=None)),
        # ... unless it is no better than the clean prediction
        ([0.9, 0.8, 0.3], [300, 100, 110], 0.8, None),
        ([0.9, 0.8, 0.3], [300, 100, 110], 0.79, Ranks(high=1, low=2, medium=None)),
        # all alike, one candidate, none
        ([0.5, 0.5, 0.45], [100] * 3, None, None),
        ([0.5], [100], None, None),
        ([], [], None, None),
        # an empty mask is no loser: it is not matched in area
        ([0.8, 0.0], [100, 0], None, None),
        # equally bad ones are low only, never medium too
        ([0.8, 0.2, 0.2], [100] * 3, None, Ranks(high=0, low=1, medium=None)),
    ],
)
def test_ranks_by_hand(
    ious: list[float], areas: list[float], clean: float | None, expected: Ranks | None
) -> None:
    assert rank(ious, areas, margin=0.1, area_ratio=1.25, clean_iou=clean) == expected


def test_a_difference_of_the_margin_and_a_ratio_of_the_limit_are_enough() -> None:
    assert rank([0.75, 0.5], [100, 125], margin=0.25, area_ratio=1.25) == Ranks(high=0, low=1, medium=None)


candidates = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 400)), max_size=6)


@given(candidates, st.floats(0.01, 0.3), st.floats(1, 3), st.none() | st.floats(0, 1))
def test_every_pair_keeps_its_promises(
    masks: list[tuple[float, int]], margin: float, area_ratio: float, clean: float | None
) -> None:
    ious, areas = [iou for iou, _ in masks], [float(area) for _, area in masks]

    def fits(winner: int, loser: int) -> bool:
        large, small = max(areas[winner], areas[loser]), min(areas[winner], areas[loser])
        better = clean is None or ious[winner] > clean
        return better and ious[winner] - ious[loser] >= margin and large <= area_ratio * small

    ranks = rank(ious, areas, margin, area_ratio, clean)
    pairs = [(w, k) for w in range(len(ious)) for k in range(len(ious)) if w != k and fits(w, k)]
    if ranks is None:
        assert not pairs
    else:
        assert fits(ranks.high, ranks.low)
        assert max(ious[w] for w, _ in pairs) == ious[ranks.high]
        if ranks.medium is not None:
            assert fits(ranks.high, ranks.medium)
            assert ious[ranks.high] > ious[ranks.medium] > ious[ranks.low]
