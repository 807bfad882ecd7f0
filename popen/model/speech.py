"""Answers word by word, with the KV cache.

Rows that share an image share its tokens' pass, and a row that has ended leaves the batch: answers of a few
words do not wait for the longest. Every row draws by its own place in its member's random numbers, so that
what it says does not depend on when the others end.

Shapes: R rows of M members (R / M each, one member behind the other), t new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from popen.model.batches import Batch
from popen.model.segmenter import Segmenter
from popen.model.states import handed, read_images

WORTH = 0.8  # rows that have ended are dropped when less than this part of the batch still speaks


@dataclass(frozen=True)
class Member:
    """How one member chooses its words: the likeliest at temperature 0, else drawn under `seed`."""

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Speech:
    tokens: Tensor  # (R, t) with the end token, and padding behind it
    logps: Tensor  # (R, t) of each token under the model itself, whatever forced or heated the choice
    hidden: Tensor  # (R, t - 1, D) last hidden states, each of the step that read the token
    told: Tensor | None  # (R, P, D), see `Segmenter.tell_cells`


def choose(
    logits: Tensor, last: Tensor, codebook: Sequence[int], never: Tensor, temperature: Tensor, chance: Tensor
) -> Tensor:
    """Each row's next token (R,). Codebook tokens come as whole targets, the others following the first in
    order.

    logits (R, V); last (R,), the token before; never (n,), tokens that are not chosen; temperature (R,), 0
    for the likeliest; chance (R,) in [0, 1) decides a draw: the token at which the distribution function
    passes it.
    """
    logits = logits.index_fill(1, never, -torch.inf)
    chosen = logits.argmax(1)
    if temperature.any():
        heated = logits.double() / temperature.clamp(min=1e-6)[:, None]
        passed = heated.softmax(1).cumsum(1)
        drawn = torch.searchsorted(passed, chance.double()[:, None] * passed[:, -1:], right=True)[:, 0]
        chosen = torch.where(temperature > 0, drawn, chosen)
    for token, follower in pairwise(codebook):
        chosen = torch.where(last == token, follower, chosen)
    return chosen


@torch.no_grad()
def speak(
    model: Segmenter, batch: Batch, features: list[Tensor], limit: int, members: Sequence[Member]
) -> Speech:
    """Answer the prompts of a batch in at most `limit` tokens, given the tower's features of its images."""
    device, rows = batch.input_ids.device, len(batch.input_ids)
    tokenizer = model.tokenizer
    codebook = tokenizer.convert_tokens_to_ids(model.encoder.codebook)
    never = torch.tensor([*codebook[1:], model.encoder.image_id], device=device)
    head, embeddings = model.causal.get_output_embeddings(), model.causal.get_input_embeddings()
    each = rows // len(members)
    streams = [torch.Generator().manual_seed(member.seed) for member in members]
    temperature = torch.tensor([member.temperature for member in members]).repeat_interleave(each).to(device)

    image = model.image_tokens(features, batch.images)
    words, _ = model.read(batch.input_ids, image, batch.image_of_row)
    cache = handed(read_images(model.causal, model.prefix(image))[1], batch.image_of_row)
    mask = batch.attention_mask
    places = (mask.cumsum(1) - 1)[:, -words.shape[1] :].clamp(min=0)
    keys = values = image.index_select(0, batch.image_of_row)
    told: Tensor | None = None
    shade = image.new_zeros((rows, 1, image.shape[1]))  # of what each row has named

    tokens = torch.full((rows, limit), tokenizer.pad_token_id, device=device)
    logps = torch.zeros((rows, limit), device=device)
    hidden = image.new_zeros((rows, limit, image.shape[-1]))
    live = torch.arange(rows, device=device)
    last, ended = torch.full_like(live, -1), torch.zeros_like(live, dtype=torch.bool)
    for step in range(limit):
        state = model.causal.base_model(
            inputs_embeds=words, attention_mask=mask, position_ids=places, cache=cache, use_cache=True
        ).last_hidden_state
        if step:
            hidden[live, step - 1] = state[:, 0].to(hidden.dtype)
        else:
            told, _ = model.tell_cells(batch, state, image)
            if model.aim is not None:
                keys, values = model.aim.remember(image, batch.image_of_row, told)
        state = state[:, -1:]
        said = (
            state if model.aim is None else model.aim.attend(state, keys, values, model.aim.fade * shade)[0]
        )
        logits = head(said.to(state.dtype))[:, 0].float()
        chance = torch.cat([torch.rand(each, generator=stream) for stream in streams]).to(device)[live]
        last = choose(logits, last, codebook, never, temperature[live], chance)
        tokens[live[~ended], step] = last[~ended]
        logps[live, step] = logits.log_softmax(1).gather(1, last[:, None])[:, 0]
        if model.aim is not None:
            naming = (last == codebook[0])[:, None, None]
            shade = shade + naming * model.aim.named(model.aim.scores(state, keys)).to(shade.dtype)
        ended = ended | (last == tokenizer.eos_token_id)
        speaking = int((~ended).sum())
        if not speaking:
            break
        words, places = embeddings(last)[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        if speaking < WORTH * len(live):
            keep = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            live, last, ended, words, places, mask, keys, values, shade = (
                part[keep] for part in (live, last, ended, words, places, mask, keys, values, shade)
            )
    return Speech(tokens[:, : step + 1], logps[:, : step + 1], hidden[:, :step], told)
