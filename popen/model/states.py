"""The language model's pass over rows about images: an image that rows share is read once.

Shapes: B images, R rows, n tokens up to and with the image's last, T' behind them, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from popen import devices
from popen.model.batches import Batch

if TYPE_CHECKING:
    from transformers import DynamicCache

PARTS = 2  # of a batch's rows, sorted by length; more lose more by launching than by padding, on a GPU two do

Seen = Sequence[tuple[Tensor, Tensor]]  # each layer's keys and values of images' prefixes (B, heads, n, d)


def read_images(causal: Any, before: Tensor) -> tuple[Tensor, Seen]:
    """Embeddings of images' prefixes (B, n, D) -> their last hidden states (B, n, D), and what rows behind
    them have to know."""
    images, n = before.shape[:2]
    places = torch.arange(n, device=before.device).expand(images, n)
    opening = causal.base_model(inputs_embeds=before, position_ids=places, use_cache=True)
    return opening.last_hidden_state, [(layer.keys, layer.values) for layer in opening.past_key_values.layers]


def handed(seen: Seen, image_of_row: Tensor) -> DynamicCache:
    """What `read_images` saw -> a cache for the rows behind the images."""
    from transformers import DynamicCache

    # the cache copies what it is given: layer by layer, or all of it would be there twice
    return DynamicCache(tuple(part.index_select(0, image_of_row) for part in layer) for layer in seen)


def last_states(causal: Any, batch: Batch, before: Tensor, behind: Tensor, whole: bool) -> Tensor:
    """Embeddings of the images' prefixes (B, n, D) and of what stands behind them (R, T', D) -> last hidden
    states (R, n + T', D).

    Rows that share an image share its tokens' pass: the prefix runs once an image, and its keys and values
    are handed to the rows. Those run in parts of about equal length, without the padding that the batch's
    longest row asks of all. The same numbers as a pass over whole rows, for less work. `whole` asks for that:
    under gradient checkpointing there is no cache to share.
    """
    places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    if whole:
        rows = causal.base_model(
            inputs_embeds=torch.cat([before.index_select(0, batch.image_of_row), behind], dim=1),
            attention_mask=batch.attention_mask,
            position_ids=places,
            use_cache=False,
        )
        return cast(Tensor, rows.last_hidden_state)
    n = before.shape[1]
    opening, seen = read_images(causal, before)
    lengths = batch.attention_mask[:, n:].sum(1)
    order = lengths.argsort()
    done: list[Tensor] = []
    # processes that share a sharded model must run its layers equally often, whatever their rows
    for part in order.chunk(1 if order.is_cuda or devices.sharded() else PARTS):
        start = behind.shape[1] - int(lengths[part].max())
        rest = causal.base_model(
            inputs_embeds=behind[part, start:],
            attention_mask=torch.cat(
                [batch.attention_mask[part, :n], batch.attention_mask[part, n + start :]], dim=1
            ),
            position_ids=places[part, n + start :],
            cache=handed(seen, batch.image_of_row[part]),
            use_cache=True,
        )
        done.append(F.pad(rest.last_hidden_state, (0, 0, start, 0)))
    last = torch.cat(done).index_select(0, order.argsort())
    return torch.cat([opening.index_select(0, batch.image_of_row), last], dim=1)
