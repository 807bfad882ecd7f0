"""What the tower and the decoder learn before there is a language model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from popen.masks import decode
from popen.model.losses import bce
from popen.model.segmenter import Segmenter
from popen.model.sight import Pixels, Sight, paint_loss
from popen.samples import Region, Sample
from tests.conftest import CATEGORIES, mini_params, square


def pixels(samples: list[Sample], drawn: list[list[int]], seed: int = 0) -> Pixels:
    images = [
        np.random.default_rng(seed + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        for i in range(len(samples))
    ]
    return Pixels.of(images, samples, drawn, CATEGORIES, 8)


def test_a_batch_holds_the_things_that_are_to_be_drawn(sample: Sample) -> None:
    cup, fork = square(4, 4, 10), Region("the fork", "fork", square(8, 8, 4).rle)
    both = replace(sample, objects=(cup, fork))
    batch = pixels([both, both, both], [[1], [], [0, 1]])
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.image_of.tolist() == [0, 2, 2]
    assert [int(mask.sum()) for mask in batch.things] == [16, 100, 16]
    assert (batch.things[1].numpy() == decode(cup.rle)).all()
    assert batch.centres.shape == (3, 2, 8, 8)
    assert batch.centres[0].sum() == 2
    assert (batch.labels[0] == 2).sum() == 16


def test_paint_loss_by_hand() -> None:
    images = torch.zeros(1, 3, 2, 4)
    images[..., 2:] = 1.0  # half black, half white: variance 1/4 in every channel
    small = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    assert float(paint_loss(small, images)) == 0.0
    assert float(paint_loss(torch.full((1, 3, 1, 2), 0.5), images)) == pytest.approx(1.0)
    assert float(paint_loss(1 - small, images)) == pytest.approx(4.0)
    assert float(paint_loss(torch.full((1, 3, 1, 2), 0.5), torch.full_like(images, 0.5))) == 0.0


def test_a_tower_that_paints_keeps_the_colours(sample: Sample) -> None:
    torch.manual_seed(0)
    images = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    batch = replace(pixels([sample] * 16, [[0]] + [[]] * 15), images=images)
    left = {}
    for weight in (0.0, 1.0):
        sight = Sight(mini_params(), CATEGORIES)
        optimizer = torch.optim.AdamW(sight.parameters(), 3e-3)
        for _ in range(60):
            seen = sight(batch)
            assert seen.painted.shape == (16, 3, 16, 16)
            named = torch.nn.functional.cross_entropy(seen.dense, torch.zeros_like(seen.dense[:, 0]).long())
            (named + weight * paint_loss(seen.painted, images)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            left[weight] = float(paint_loss(sight(batch).painted, images))
    assert left[1.0] < 0.3 < left[0.0]


def test_the_decoder_learns_which_thing_is_meant_from_where_it_lies(sample: Sample) -> None:
    """Two things of one image, told apart by the cells under them alone: each mask is one of them."""
    torch.manual_seed(0)
    things = (Region("", "cup", square(0, 8, 12).rle), Region("", "cup", square(20, 16, 12).rle))
    batch = pixels([replace(sample, objects=things)], [[0, 1]])
    sight = Sight(mini_params(), CATEGORIES)
    optimizer = torch.optim.AdamW(sight.parameters(), 3e-3)
    for _ in range(80):
        bce(sight(batch).masks, batch.things, torch.ones_like(batch.things)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn, true = sight(batch).masks > 0, batch.things > 0
    ious = (drawn & true).sum((1, 2)) / (drawn | true).sum((1, 2))
    assert ious.min() > 0.8
    assert not (drawn[0] & true[1]).any()


def test_what_is_learned_fits_the_segmenter(mini_model: Segmenter, sample: Sample) -> None:
    """The stage `sft` loads it without strictness: every name and shape must be the segmenter's."""
    sight = Sight(mini_params(), CATEGORIES).eval()
    state, whole = sight.shared(), mini_model.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: whole[name].shape for name in state}
    assert {"tower", "neck", "dense", "centres", "codebook", "decoder"} == {
        name.partition(".")[0] for name in state
    }
    mini_model.load_state_dict(state, strict=False)
    batch = pixels([replace(sample, objects=sample.targets)], [[0]])
    seen, features = sight(batch), mini_model.tower(batch.images)
    torch.testing.assert_close(seen.dense, mini_model.dense(mini_model.neck(features)[-1]))
    assert mini_model.centres is not None
    torch.testing.assert_close(seen.centres, mini_model.centres(features))
    # an embedding that looks at the thing's cells alone, and says nothing besides, draws the same mask
    cells = torch.nn.functional.adaptive_avg_pool2d(batch.things, features[0].shape[-1]).flatten(1)
    shares = (cells / cells.sum())[:, None].expand(-1, 2, -1)
    pool = mini_model.codebook.pool
    embedding = pool(pool.cells(features[0]), shares, batch.image_of)
    torch.testing.assert_close(
        seen.masks, mini_model.decode(embedding, features, batch.images, batch.image_of), rtol=1e-4, atol=1e-5
    )
