"""Free-running answers: words with the KV cache, masks from the very hidden states of that pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from popen.model.batches import Batch, Row
from popen.model.segmenter import Segmenter
from popen.samples import SEG


@dataclass(frozen=True)
class Answer:
    text: str  # with `{seg}`
    token_ids: list[int]  # without the end token
    logp: float  # mean log-likelihood of the words (forced codebook tokens and padding left out)
    embeddings: Tensor  # (n, S, C)
    masks: Tensor  # (n, H, W) logits


class WholeTargets(LogitsProcessor):
    """Codebook tokens come as whole targets, the others following the first in order; image tokens never."""

    def __init__(self, codebook_ids: Sequence[int], image_id: int) -> None:
        self.ids = list(codebook_ids)
        self.never = [*self.ids[1:], image_id]
        self.follower = dict(zip(self.ids, self.ids[1:], strict=False))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.never] = -torch.inf
        if input_ids.shape[1]:
            for row, last in enumerate(input_ids[:, -1].tolist()):
                if last in self.follower:
                    scores[row] = -torch.inf
                    scores[row, self.follower[last]] = 0.0
        return scores


class Draws(LogitsProcessor):
    """Members in one batch: the rows of the first choose the likeliest word, those of member m are drawn from
    a stream of their own, seeded `seed` + m. The same draws as M calls of `generate` make."""

    def __init__(self, members: int, temperature: float, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self.streams = [torch.Generator(device).manual_seed(seed + m) for m in range(1, members)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first, *others = scores.chunk(1 + len(self.streams))
        chosen = [first.argmax(-1, keepdim=True)]
        for rows, stream in zip(others, self.streams, strict=True):
            chosen.append(torch.multinomial((rows / self.temperature).softmax(-1), 1, generator=stream))
        return torch.full_like(scores, -torch.inf).scatter(1, torch.cat(chosen), 0.0)


@torch.no_grad()
def generate(
    model: Segmenter,
    images: Sequence[Image.Image],
    rows: Sequence[Row],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    pixels: Tensor | None = None,
) -> list[Answer]:
    """Answer every row. Greedy at temperature 0, else sampled under `seed` (same seed, same answers).

    `pixels` (B, 3, H, W) replaces the images' pixels (perturbed members of an ensemble).
    """
    batch = model.encoder.batch(images, [Row(row.image, row.question) for row in rows])
    if pixels is not None:
        batch = batch.with_images(pixels)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:  # from the whole distribution: without top_k transformers takes the best 50
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _generate(model, batch.to(model.device), max_new_tokens, [], **sampling)


@torch.no_grad()
def generate_members(
    model: Segmenter,
    images: Sequence[Image.Image],
    rows: Sequence[Row],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    views: Tensor,
) -> list[list[Answer]]:
    """What M members say, in one pass over all: M lists of an answer a row.

    `views` (M, B, 3, H, W): member 0 answers greedily about views[0], member m what `generate` would sample
    about views[m] under `seed` + m. A word takes a large model about as long for all members as for one.
    """
    batch = model.encoder.batch(images, [Row(row.image, row.question) for row in rows]).repeated(views)
    draws = Draws(len(views), temperature, seed, model.device)
    said = _generate(model, batch.to(model.device), max_new_tokens, [draws], do_sample=False)
    return [said[start : start + len(rows)] for start in range(0, len(said), len(rows))]


def _generate(
    model: Segmenter, batch: Batch, max_new_tokens: int, draws: Sequence[LogitsProcessor], **sampling: Any
) -> list[Answer]:
    features = model.tower(batch.images)
    codebook = model.tokenizer.convert_tokens_to_ids(model.encoder.codebook)
    # read off by a hook: transformers' `output_hidden_states` keeps those of every layer, the image's too
    states: list[Tensor] = []
    image = model.image_tokens(features)
    own = image.index_select(0, batch.image_of_row)

    def read_off(module: Any, given: Any, told: Any) -> None:
        states.append(told.last_hidden_state[:, -1].clone())
        told.last_hidden_state, _ = model.speak(told.last_hidden_state[:, -1:], own)

    hook = model.causal.base_model.register_forward_hook(read_off)
    embeds = model.embed(batch.input_ids, image, batch.image_of_row)
    try:
        output = model.causal.generate(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            **sampling,
            logits_processor=LogitsProcessorList([WholeTargets(codebook, model.encoder.image_id), *draws]),
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        hook.remove()
    sequences: Tensor = output.sequences  # (R, t): new tokens only, since embeddings were given
    # step i + 1 reads token i: its hidden state is the one a teacher-forced pass would give
    shape = (len(sequences), 0, 1)
    hidden = torch.stack(states[1:], dim=1) if states[1:] else features[0].new_zeros(shape)
    logps = torch.stack(
        [
            step.float().log_softmax(-1).gather(-1, sequences[:, at, None])[:, 0]
            for at, step in enumerate(output.logits)
        ],
        dim=1,
    )
    return _answers(model, batch, features, batch.images, sequences, hidden, logps, codebook)


def _answers(
    model: Segmenter,
    batch: Batch,
    features: list[Tensor],
    pixels: Tensor,
    sequences: Tensor,
    hidden: Tensor,
    logps: Tensor,
    codebook: list[int],
) -> list[Answer]:
    tokenizer, size = model.tokenizer, len(codebook)
    texts, ids, means, counts, chosen, image_of = [], [], [], [], [], []
    for row, sequence in enumerate(sequences.tolist()):
        end = sequence.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in sequence else len(sequence)
        firsts = [i for i, token in enumerate(sequence[:end]) if token == codebook[0]]
        if firsts and firsts[-1] + size > hidden.shape[1]:  # cut off inside its last target
            end = firsts.pop()
        words = [i for i in range(min(end + 1, len(sequence))) if sequence[i] not in codebook[1:]]
        means.append(float(logps[row, words].mean()) if words else 0.0)
        ids.append(sequence[:end])
        texts.append(_text(tokenizer, sequence[:end], codebook))
        counts.append(len(firsts))
        image_of += [int(batch.image_of_row[row])] * len(firsts)
        chosen += [hidden[row, first : first + size] for first in firsts]
    images = torch.tensor(image_of, dtype=torch.long, device=model.device)
    if chosen:
        shape = (len(chosen), model.codebook.scales, model.codebook.tokens, -1)
        states = torch.stack(chosen).float().view(shape)
        embeddings, _ = model.codebook(states, features[0], images)
    else:
        embeddings = torch.zeros((0, model.codebook.scales, model.params.decoder.width), device=model.device)
    masks = model.decode(embeddings, features, pixels, images)
    per_row = zip(texts, ids, means, embeddings.split(counts), masks.split(counts), strict=True)
    return [Answer(*fields) for fields in per_row]


def _text(tokenizer: Any, ids: list[int], codebook: list[int]) -> str:
    """Ids -> text, each whole target as `{seg}`."""
    pieces, special = [list[int]()], {*tokenizer.all_special_ids, *codebook}
    for token in ids:
        if token == codebook[0]:
            pieces.append([])
        elif token not in special:
            pieces[-1].append(token)
    # Llama's decoder takes a space off the start of what it gets: a piece behind a target brings the target's
    # first token along, and keeps its space
    first, *rest = [
        tokenizer.decode(codebook[:1] * (number > 0) + words, clean_up_tokenization_spaces=False)
        for number, words in enumerate(pieces)
    ]
    name = tokenizer.decode(codebook[:1])
    return SEG.join([first, *(piece.removeprefix(name) for piece in rest)]).strip()
