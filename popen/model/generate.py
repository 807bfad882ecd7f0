"""Free-running answers: words with the KV cache, masks from the very hidden states of that pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from popen.model.batches import Batch, Row
from popen.model.segmenter import Segmenter
from popen.model.speech import Member, speak
from popen.samples import SEG

# Rows that a device answers at once where there are several members. What the language model keeps of these
# is 16 GiB for LLaVA-1.5-7B and 25 for 13B (computed), beside that of their images.
ROWS_AT_ONCE = {"cuda": 32}


@dataclass(frozen=True)
class Answer:
    text: str  # with `{seg}`
    token_ids: list[int]  # without the end token
    logp: float  # mean log-likelihood of the words (forced codebook tokens and padding left out)
    embeddings: Tensor  # (n, S, C)
    masks: Tensor  # (n, H, W) logits
    ended: bool = True  # by the model; else it was cut off


@torch.no_grad()
def generate(
    model: Segmenter,
    images: Sequence[Image.Image],
    rows: Sequence[Row],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:
    """Answer every row. Greedy at temperature 0, else sampled under `seed` (same seed, same answers)."""
    return generate_members(model, images, rows, max_new_tokens, [Member(temperature, seed)])[0]


@torch.no_grad()
def generate_members(
    model: Segmenter,
    images: Sequence[Image.Image],
    rows: Sequence[Row],
    max_new_tokens: int,
    members: Sequence[Member],
) -> list[list[Answer]]:
    """What M members say, in one pass over all: M lists of an answer a row, each as `generate` gives it.

    A word takes a large model on a GPU about as long for all members as for one, and the images are read
    once; but no more than ROWS_AT_ONCE rows are answered together there, or one member's.
    """
    most = ROWS_AT_ONCE.get(model.device.type, len(rows) * len(members))
    together = max(1, most // max(1, len(rows)))
    found = []
    for first in range(0, len(members), together):
        some = members[first : first + together]
        asked = [Row(row.image, row.question) for row in rows] * len(some)
        batch = model.encoder.batch(images, asked).to(model.device)
        said = _generate(model, batch, max_new_tokens, some)
        found += [said[start : start + len(rows)] for start in range(0, len(said), len(rows))]
    return found


def _generate(model: Segmenter, batch: Batch, max_new_tokens: int, members: Sequence[Member]) -> list[Answer]:
    features = model.tower(batch.images)
    speech = speak(model, batch, features, max_new_tokens, members)
    tokenizer = model.tokenizer
    codebook = tokenizer.convert_tokens_to_ids(model.encoder.codebook)
    size = len(codebook)
    texts, ids, means, ended, counts, chosen, row_of = [], [], [], [], [], [], []
    for row, tokens in enumerate(speech.tokens.tolist()):
        ended.append(tokenizer.eos_token_id in tokens)
        end = tokens.index(tokenizer.eos_token_id) if ended[-1] else len(tokens)
        firsts = [i for i, token in enumerate(tokens[:end]) if token == codebook[0]]
        if firsts and firsts[-1] + size > speech.hidden.shape[1]:  # cut off inside its last target
            end = firsts.pop()
        words = [i for i in range(min(end + 1, len(tokens))) if tokens[i] not in codebook[1:]]
        means.append(float(speech.logps[row, words].mean()) if words else 0.0)
        ids.append(tokens[:end])
        texts.append(_text(tokenizer, tokens[:end], codebook))
        counts.append(len(firsts))
        row_of += [row] * len(firsts)
        chosen += [speech.hidden[row, first : first + size] for first in firsts]
    rows = torch.tensor(row_of, dtype=torch.long, device=model.device)
    images = batch.image_of_row[rows]
    if chosen:
        shape = (len(chosen), model.codebook.scales, model.codebook.tokens, -1)
        told = None if speech.told is None else speech.told[rows].float()
        embeddings, _ = model.codebook(torch.stack(chosen).float().view(shape), features[0], images, told)
    else:
        embeddings = torch.zeros((0, model.codebook.scales, model.params.decoder.width), device=model.device)
    masks = model.decode(embeddings, features, batch.images, images)
    per_row = zip(texts, ids, means, embeddings.split(counts), masks.split(counts), ended, strict=True)
    return [Answer(*fields) for fields in per_row]


def _text(tokenizer: Any, ids: list[int], codebook: list[int]) -> str:
    """Ids -> text, each whole target as `{seg}`; the same letters in ordinary tokens are a word ("seg")."""
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
    spoken = (piece.replace(SEG, "seg") for piece in (first, *(piece.removeprefix(name) for piece in rest)))
    return SEG.join(spoken).strip()
