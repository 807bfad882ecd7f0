from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from popen.masks import encode
from popen.model import IGNORED
from popen.model.segmenter import Segmenter
from popen.model.tally import (
    KNOWN,
    LOUD,
    Centres,
    census,
    centre_labels,
    centre_loss,
    colours,
    count_accuracy,
    counts,
    facts,
)
from popen.samples import Region, Sample
from tests.conftest import CATEGORIES, square


def a_map(*centres: tuple[int, int, int], grid: int = 8) -> torch.Tensor:
    """Logits (1, 2, grid, grid) that are sure of these (kind, row, column) and of no others."""
    logits = torch.full((1, 2, grid, grid), -8.0)
    for kind, row, column in centres:
        logits[0, kind, row, column] = 8.0
    return logits


def test_a_centre_lies_where_the_visible_pixels_have_theirs(sample: Sample) -> None:
    labels = centre_labels(sample, CATEGORIES, 8)
    assert labels.shape == (2, 8, 8)
    assert labels.sum() == 2
    assert labels[0, 2, 2] == 1  # the cup covers rows and columns 4 to 13 of 32: centre 9, and 9 / 4 = 2.25
    assert labels[1, 6, 6] == 1  # the fork 20 to 27: centre 24
    hidden = np.zeros((32, 32), dtype=bool)
    half = replace(sample, objects=(square(4, 4, 10), Region("a cup", "cup", encode(hidden))))
    assert centre_labels(half, CATEGORIES, 8).sum() == 1  # nothing shows of the second
    odd = replace(sample, objects=(Region("a sea", "sea", square(0, 0, 32).rle),))
    assert centre_labels(odd, CATEGORIES, 8).sum() == 0
    for unknown in (replace(sample, objects=()), replace(sample, benchmark="grandf")):
        assert (centre_labels(unknown, CATEGORIES, 8) == IGNORED).all()


def test_things_in_the_corners_stay_inside(sample: Sample) -> None:
    corners = tuple(square(x, y, 1) for x in (0, 31) for y in (0, 31))
    labels = centre_labels(replace(sample, objects=corners), CATEGORIES, 8)
    assert labels[0].sum() == 4
    assert labels[0, [0, 0, 7, 7], [0, 7, 0, 7]].tolist() == [1, 1, 1, 1]


def test_peaks_are_counted_kind_by_kind() -> None:
    found = counts(a_map((0, 1, 1), (0, 1, 4), (0, 6, 6), (1, 3, 3)))
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0]]), atol=1e-3, rtol=0)
    assert float(counts(a_map()).sum()) == 0.0
    wide = a_map((0, 2, 2))
    wide[0, 0, 2, 3] = 7.0  # the same thing's slope, lower than its neighbour
    assert float(counts(wide)[0, 0]) == pytest.approx(1.0, abs=1e-3)
    unsure = a_map()
    unsure[0, 0, 2, 2] = float(torch.logit(torch.tensor(0.35)))
    assert float(counts(unsure)[0, 0]) == pytest.approx(0.5)


def test_how_things_lie() -> None:
    """Of 8 x 8 cells, an eighth of the image each."""
    three = census(a_map((0, 1, 1), (0, 1, 3), (0, 4, 6), (1, 3, 3)))[0]
    torch.testing.assert_close(three[0], torch.tensor([1, 1, 0, 1.5, 1.5, 1.5]), atol=0.03, rtol=0)  # clamped
    torch.testing.assert_close(three[1], torch.zeros(6), atol=0.03, rtol=0)  # a single one reaches nowhere
    two = census(a_map((0, 2, 2), (0, 5, 3), (1, 2, 6), (1, 3, 4)))[0]
    torch.testing.assert_close(two[0], torch.tensor([1, 0, 0, 0.5, 1.5, 1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(two[1, 3:], torch.tensor([1.0, 0.5, 1.5]), atol=0.03, rtol=0)
    assert float(census(a_map()).abs().max()) < 0.03


def test_a_centre_between_two_cells_lies_there() -> None:
    between = a_map((0, 2, 1), (0, 2, 3))
    between[0, 0, 2, 4] = between[0, 0, 2, 3] - 1e-3  # as high as its neighbour, but for the tie
    assert float(census(between)[0, 0, 3]) == pytest.approx(4 * 2.5 / 8, abs=0.03)


def test_a_token_is_told_of_the_kinds_that_it_shows() -> None:
    shows = torch.zeros(1, 2, 4)
    shows[0, 0, 0] = 1.0  # the first token shows a cup, the second half of one and half of a fork,
    shows[0, :, 1] = 0.5
    shows[0, 1, 2] = 1.0  # the third a fork, the fourth nothing
    known = torch.tensor([[[1, 1, 0, 0.5, 0.2, 0.1], [0, 0, 0, 0, 0, 0]]])
    looks = torch.rand(1, 4, 3)
    told = facts(known, shows, looks)[0] / LOUD
    half = [0.5, 0.5, 0, 0.25, 0.1, 0.05, 1]
    expected = torch.tensor([[1, 1, 0, 0.5, 0.2, 0.1, 1], half, [0] * 6 + [1], [0] * 7])
    torch.testing.assert_close(told[:, :7], expected)
    torch.testing.assert_close(told[:, 8:], looks[0])


def test_a_token_is_told_how_large_what_it_shows_is_for_its_kind() -> None:
    """A cup on four tokens of a corner, another on two of the other, and a fork on one."""
    shows = torch.zeros(1, 2, 6, 6)
    shows[0, 0, :2, :2] = 1.0
    shows[0, 0, 4:, 5] = 1.0
    shows[0, 1, 5, 0] = 0.5
    told = facts(torch.zeros(1, 2, KNOWN), shows.flatten(2), torch.zeros(1, 36, 3))[0, :, 7] / LOUD
    large = told.view(6, 6)
    torch.testing.assert_close(large[:2, :2], torch.ones(2, 2))
    torch.testing.assert_close(large[4:, 5], torch.full((2,), 0.5))
    assert float(large[5, 0]) == 0.5  # the largest of its kind, as far as the token shows it
    assert float(large.sum()) == 4 + 2 * 0.5 + 0.5


def test_a_token_is_told_the_colour_of_the_things_that_it_shows() -> None:
    image = torch.zeros(1, 3, 8, 8)
    image[0, :, :4, :4] = torch.tensor([1.0, 0.5, 0.0])[:, None, None]  # an orange thing on all of a token
    image[0, 2, :4, 4:] = 1.0  # a blue one, of which the token shows the half
    things = torch.zeros(1, 4, 4)
    things[0, :2, :2] = 1.0
    things[0, :2, 2] = 1.0
    seen = colours(image, things, 2)[0]
    expected = torch.tensor([[1.0, 0.0, -1.0], [-0.5, -0.5, 0.5], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(seen, expected)


def test_centre_loss_by_hand() -> None:
    p = torch.tensor([[[[0.8, 0.1]]]])
    labels = torch.tensor([[[[1, 0]]]])
    expected = -(0.2**2) * np.log(0.8) - 0.1**2 * np.log(0.9)
    assert float(centre_loss(torch.logit(p), labels)) == pytest.approx(expected, rel=1e-5)
    two = torch.logit(p.expand(1, 2, 1, 2))
    assert float(centre_loss(two, labels.expand(1, 2, 1, 2))) == pytest.approx(expected, rel=1e-5)
    assert float(centre_loss(torch.logit(p), torch.full_like(labels, IGNORED))) == 0.0


def test_count_accuracy_by_hand() -> None:
    labels = (a_map((0, 1, 1), (0, 5, 5), (1, 3, 3)) > 0).long()
    assert count_accuracy(a_map((0, 1, 2), (0, 6, 5), (1, 3, 3)), labels) == 1.0
    assert count_accuracy(a_map((0, 1, 1), (1, 3, 3)), labels) == 0.5
    assert count_accuracy(a_map((0, 1, 1), (0, 5, 5)), labels) == 0.5
    absent = labels.clone()
    absent[:, 1] = 0
    assert count_accuracy(a_map((0, 1, 1), (0, 5, 5)), absent) == 1.0  # no fork, and none said
    assert count_accuracy(a_map(), torch.full_like(labels, IGNORED)) == 0.0


def test_centres_are_learnt() -> None:
    torch.manual_seed(0)
    where = torch.rand(16, 2, 8, 8) < 0.05
    features = [torch.randn(16, 6, 4, 4), where.float().repeat(1, 2, 1, 1)]
    head = Centres([6, 4], 2)
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(150):
        loss = centre_loss(head(features), where.long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = head(features)[:, :, 1:-1, 1:-1] > 0
    assert float((found == where[:, :, 1:-1, 1:-1]).float().mean()) > 0.98


def test_the_image_tokens_are_told_the_facts(mini_model: Segmenter) -> None:
    """The image's tokens are the projector's and what `tell` makes of the facts; no gradient of the words
    reaches what counts."""
    centres, tell = mini_model.centres, mini_model.tell
    assert centres is not None
    assert tell is not None
    images = torch.rand(1, 3, 32, 32)
    features = [level.requires_grad_() for level in mini_model.tower(images)]
    plain = mini_model.projector(features[0])
    told = mini_model.image_tokens(features, images) - plain
    shows = mini_model.dense(mini_model.neck(features)[-1]).softmax(1)[:, 1:]
    shares = torch.nn.functional.adaptive_avg_pool2d(shows, 4).flatten(2)
    looks = colours(images, shows.sum(1), 4)
    torch.testing.assert_close(told, tell(facts(census(centres(features)), shares, looks)))
    mini_model.zero_grad()
    mini_model.image_tokens(features, images).sum().backward()
    assert tell.weight.grad is not None
    assert all(p.grad is None for p in centres.parameters())
    assert all(p.grad is None for p in mini_model.dense.parameters())
