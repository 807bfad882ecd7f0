"""The dense auxiliary: labels, loss, accuracy, and weights that fit the whole model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from popen.model.dense import (
    IGNORED,
    DenseTower,
    Pixels,
    categories_of,
    dense_accuracy,
    dense_labels,
    dense_loss,
    image_array,
    mask_array,
    paint_loss,
)
from popen.model.segmenter import Segmenter
from popen.model.tally import centre_labels
from popen.samples import Region, Sample
from tests.conftest import CATEGORIES, mini_params, square


def test_labels_put_smaller_things_on_top(sample: Sample) -> None:
    cup, fork = square(4, 4, 10), Region("the fork", "fork", square(8, 8, 4).rle)
    things = replace(sample, objects=(fork, cup, Region("a pear", "pear", square(0, 0, 2).rle)))
    labels = dense_labels(things, CATEGORIES, 32)
    assert (labels == 2).sum() == 16  # the fork lies on the cup
    assert (labels == 1).sum() == 100 - 16
    assert (labels == IGNORED).sum() == 4  # a pear is no category of the model
    assert labels[31, 31] == 0


@pytest.mark.parametrize("benchmark", ["reasonseg", "grandf"])
def test_background_is_unknown_where_only_some_things_are_annotated(sample: Sample, benchmark: str) -> None:
    labels = dense_labels(replace(sample, benchmark=benchmark), CATEGORIES, 32)
    assert set(np.unique(labels)) == {IGNORED, 1, 2}
    assert set(np.unique(dense_labels(replace(sample, objects=()), CATEGORIES, 32))) == {IGNORED}


def test_kinds_are_sorted_and_the_empty_one_left_out(sample: Sample) -> None:
    unnamed = replace(sample, objects=(Region("it", "", sample.targets[0].rle),))
    assert categories_of([sample, unnamed]) == ["cup", "fork"]


def test_masks_shrink_by_area_and_images_to_the_square() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[:2, :2] = True  # a whole pixel of the small mask ...
    mask[2, 4:8] = True  # ... half of two, which counts ...
    mask[3, 0] = True  # ... and a quarter of one, which does not
    assert mask_array(mask[:, :4], 2).tolist() == [[True, False], [False, False]]
    assert mask_array(mask[:, 4:], 2).tolist() == [[False, False], [True, True]]
    assert image_array(Image.new("RGB", (9, 5), "red"), 4).shape == (4, 4, 3)
    assert (image_array(Image.new("RGB", (9, 5), "red"), 4) == [255, 0, 0]).all()


def test_loss_and_accuracy_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])).T.view(1, 3, 1, 2)
    labels = torch.tensor([[[0, 1]]])
    assert float(dense_loss(logits, labels)) == pytest.approx(-(np.log(0.5) + np.log(0.8)) / 2)
    unknown = torch.tensor([[[IGNORED, 2]]])
    assert float(dense_loss(logits, unknown)) == pytest.approx(-np.log(0.1))
    assert float(dense_loss(logits, torch.full((1, 1, 2), IGNORED))) == 0.0
    assert dense_accuracy(logits, labels) == (1.0, 1.0)
    assert dense_accuracy(logits, torch.tensor([[[0, 2]]])) == (0.5, 0.0)
    assert dense_accuracy(logits, unknown) == (0.0, 0.0)


def test_paint_loss_by_hand() -> None:
    images = torch.zeros(1, 3, 2, 4)
    images[..., 2:] = 1.0  # half black, half white: variance 1/4 in every channel
    small = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    assert float(paint_loss(small, images)) == 0.0
    assert float(paint_loss(torch.full((1, 3, 1, 2), 0.5), images)) == pytest.approx(1.0)
    assert float(paint_loss(1 - small, images)) == pytest.approx(4.0)
    assert float(paint_loss(torch.full((1, 3, 1, 2), 0.5), torch.full_like(images, 0.5))) == 0.0


def test_a_tower_that_paints_keeps_the_colours() -> None:
    torch.manual_seed(0)
    images = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    labels = torch.zeros(16, 32, 32, dtype=torch.long)
    left = {}
    for weight in (0.0, 1.0):
        tower = DenseTower(mini_params(), CATEGORIES)
        optimizer = torch.optim.AdamW(tower.parameters(), 3e-3)
        for _ in range(60):
            logits, painted, _ = tower(images)
            assert painted.shape == (16, 3, 16, 16)
            (dense_loss(logits, labels) + weight * paint_loss(painted, images)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            left[weight] = float(paint_loss(tower(images)[1], images))
    assert left[1.0] < 0.3 < left[0.0]


def test_a_pretrained_tower_fits_the_segmenter(mini_model: Segmenter, sample: Sample) -> None:
    """The stage `sft` loads it without strictness: every name and shape must be the segmenter's."""
    tower = DenseTower(mini_params(), CATEGORIES)
    state, whole = tower.shared(), mini_model.state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: whole[name].shape for name in state}
    mini_model.load_state_dict(state, strict=False)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    labels, centres = dense_labels(sample, CATEGORIES, 32), centre_labels(sample, CATEGORIES, 8)
    pixels = Pixels.of([image], [labels], [centres])
    torch.testing.assert_close(
        tower.eval()(pixels.images)[0],
        mini_model.dense(mini_model.neck(mini_model.tower(pixels.images))[-1]),
    )
    assert mini_model.centres is not None
    torch.testing.assert_close(tower(pixels.images)[2], mini_model.centres(mini_model.tower(pixels.images)))
