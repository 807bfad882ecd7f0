"""An image that rows share is read once, and nothing changes by it."""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image

from popen.model.segmenter import Segmenter
from popen.model.states import last_states
from popen.samples import Sample
from tests.model.test_segmenter import rows


def test_a_shared_prefix_equals_whole_rows(
    mini_model: Segmenter, picture: Image.Image, sample: Sample
) -> None:
    """Rows of one image share its tokens' pass; the hidden states are those of each row on its own."""
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    three = [rows(sample)[0], dataclasses.replace(rows(sample)[1], image=1), rows(sample)[1]]
    batch = mini_model.encoder.batch([picture, other], three)
    features = mini_model.tower(batch.images)
    image = mini_model.image_tokens(features, batch.images)
    behind, _ = mini_model.read(batch.input_ids, image, batch.image_of_row, batch.asked)
    embeds = torch.cat([mini_model.prefix(image)[batch.image_of_row], behind], dim=1)
    whole = mini_model.causal.model(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask,
        position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0),
    ).last_hidden_state
    shared = mini_model.hidden(batch, mini_model.image_tokens(features, batch.images))
    before = mini_model.prefix(image)
    for checkpointing in (False, True):
        states = last_states(mini_model.causal, batch, before, behind, checkpointing)
        torch.testing.assert_close(states, whole if checkpointing else shared)
    seen = batch.attention_mask.bool()
    torch.testing.assert_close(shared[seen], whole[seen], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(shared[1][seen[1]], shared[2][seen[2]], atol=1e-3)
