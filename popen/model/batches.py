"""Rows of questions and answers -> padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from popen.masks import Mask
from popen.model import IGNORED
from popen.model.codebook import spell
from popen.model.dense import dense_labels, image_array, mask_array
from popen.model.language import IMAGE, PROMPT
from popen.model.look import NOTHING
from popen.model.tally import centre_labels
from popen.model.words import Vocabulary
from popen.samples import Sample


@dataclass(frozen=True)
class Row:
    """A question about image number `image` of its batch; `answer` None asks for one to be generated.

    `masks` (one a `{seg}`, any size) supervise the answer's targets; None leaves them unsupervised. Where not
    `drawn`, they teach where a target is, and the model draws none for them: drawing is what costs.
    `kinds` (one a `{seg}`) are what the answer names; None where they are not to be learnt.
    """

    image: int
    question: str
    answer: str | None = None
    masks: Sequence[Mask] | None = None
    ignore: Mask | None = None
    kinds: Sequence[str] | None = None
    drawn: bool = True


@dataclass(frozen=True)
class Batch:
    images: Tensor  # (B, 3, H, W) in [0, 1]
    image_of_row: Tensor  # (R,)
    input_ids: Tensor  # (R, T): the prefix with the P image tokens, padding, question and answer
    attention_mask: Tensor  # (R, T)
    # IGNORED outside the answer, and at the codebook tokens that follow a target's first: generation
    # forces them, and to predict them would fill the very hidden states that make the embedding
    labels: Tensor  # (R, T)
    row_of_target: Tensor  # (N,) supervised targets only
    positions: Tensor  # (N, S*K) places of their codebook tokens
    masks: Tensor  # (N, H, W) float 0/1
    valid: Tensor  # (N, H, W) float, 0 where the sample says "ignore"
    dense: Tensor | None = None  # (B, H, W) class of every pixel, IGNORED where unknown
    inventory: Tensor | None = None  # (R, categories) how many of each the answer names, IGNORED: unknown
    centres: Tensor | None = None  # (B, categories, h, w) as `centre_labels` makes them
    named: Tensor | None = None  # (R, T) the kind that a word of the question names, NOTHING or IGNORED
    # (R, T) the target (of N) that an answer comes to next, as seen from before each of its words; NOTHING
    # behind the last, IGNORED where masks are not supervised and where the next token is forced
    aimed: Tensor | None = None
    drawn: Tensor | None = None  # (N,) bool: the model draws a mask for the target; None: for all

    @property
    def answered(self) -> Tensor:
        """(R, T - 1) bool: the places whose next token belongs to an answer."""
        return self.labels[:, 1:] != IGNORED

    @property
    def asked(self) -> Tensor:
        """(R,) place of the prompt's last token."""
        answered = self.answered
        return torch.where(answered.any(1), answered.int().argmax(1), answered.shape[1])

    @property
    def image_of_target(self) -> Tensor:
        return self.image_of_row[self.row_of_target]

    def of_drawn(self, part: Tensor) -> Tensor:
        """Rows of a tensor (N, ...) that belong to targets with drawn masks."""
        return part if self.drawn is None else part[self.drawn]

    def with_images(self, images: Tensor) -> Batch:
        """The same rows about other pixels (B, 3, H, W): perturbed copies of the images."""
        return replace(self, images=images)

    def repeated(self, views: Tensor) -> Batch:
        """The same rows about each of M views (M, B, 3, H, W) of the images, in one batch: first all rows
        about view 0, then all about view 1, ... Without what the auxiliary losses compare with."""
        members, rows = len(views), len(self.input_ids)
        shift = torch.arange(members, device=self.input_ids.device)[:, None]
        same = ("input_ids", "attention_mask", "labels", "positions", "masks", "valid")
        again = {name: torch.cat([getattr(self, name)] * members) for name in same}
        return Batch(
            images=views.flatten(0, 1),
            image_of_row=(self.image_of_row + shift * views.shape[1]).flatten(),
            row_of_target=(self.row_of_target + shift * rows).flatten(),
            **again,
        )

    def first_rows(self, count: int) -> Batch:
        """The first `count` rows, which must hold every supervised target."""
        rows = ("image_of_row", "input_ids", "attention_mask", "labels", "inventory", "named", "aimed")
        known = {name: getattr(self, name) for name in rows}
        return replace(self, **{name: part[:count] for name, part in known.items() if part is not None})

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


def _behind_image(question: str) -> str:
    return PROMPT.partition(IMAGE)[2].format(question=question)


class Encoder:
    """Turns images and rows into a Batch for one model (its tokenizer, codebook and sizes)."""

    def __init__(
        self,
        tokenizer: Any,
        codebook: Sequence[str],
        image_tokens: int,
        size: int,
        categories: Sequence[str],
        grid: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.codebook = list(codebook)
        self.image_tokens = image_tokens
        self.size, self.grid = size, grid  # of masks, and of the map of centres
        self.categories = list(categories)
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.vocabulary = Vocabulary(categories)
        self.kinds_of: dict[str, list[int]] = {}  # two kinds may have one name in the vocabulary: cup and mug
        for kind, name in enumerate(categories):
            self.kinds_of.setdefault(self.vocabulary.category(name), []).append(kind)
        self.first_id = tokenizer.convert_tokens_to_ids(self.codebook[0])
        # Llama's kind of tokenizer puts a space before a text, which the text behind the image must not get
        alone, behind = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", IMAGE + "\n"))
        self.spaces = len(alone) - len(behind[1:])

    @property
    def prefix_ids(self) -> list[int]:
        """Ids that open every prompt: the text before the image, and the image token once a token of it."""
        before = self.tokenizer.encode(PROMPT.partition(IMAGE)[0], add_special_tokens=False)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return bos + before + [self.image_id] * self.image_tokens

    def question_ids(self, question: str) -> list[int]:
        """Ids of the prompt behind the image."""
        ids: list[int] = self._question(question)["input_ids"]
        return ids[self.spaces :]

    def question_kinds(self, question: str) -> list[int]:
        """The kind that each of `question_ids` names, or NOTHING, or IGNORED where it may be one of several.
        Names of one token: a word by itself does not know what its neighbours say."""
        offsets = self._question(question, return_offsets_mapping=True)["offset_mapping"]
        names = self.vocabulary.named(_behind_image(question))
        kinds = [
            next((self._kind(name) for start, end, name in names if first <= start and end <= last), NOTHING)
            for first, last in offsets
        ]
        return kinds[self.spaces :]

    def _kind(self, name: str) -> int:
        kinds = self.kinds_of[name]
        return kinds[0] if len(kinds) == 1 else IGNORED

    def _question(self, question: str, **asked: bool) -> Any:
        # a question that spells a special token ("<image>") gets its letters, never the token
        text = _behind_image(question)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, **asked)

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with `{seg}`, closed by the end token."""
        spelled = spell(" " + answer, self.codebook)
        return [*self.tokenizer.encode(spelled, add_special_tokens=False), self.tokenizer.eos_token_id]

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images -> (B, 3, H, W) in [0, 1]."""
        arrays = np.stack([image_array(image, self.size) for image in images])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255

    def batch(
        self, images: Sequence[Image.Image], rows: Sequence[Row], dense: Sequence[Sample] = ()
    ) -> Batch:
        """Encode. `dense`, one sample an image, asks for labels of its pixels, its things' centres and the
        words of questions and answers, made of its objects and of the rows' masks."""
        prefix, forced = self.prefix_ids, set(self.tokenizer.convert_tokens_to_ids(self.codebook[1:]))
        prompts = [self.question_ids(row.question) for row in rows]
        answers = [[] if row.answer is None else self.answer_ids(row.answer) for row in rows]
        length = len(prefix) + max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        attention = torch.zeros((len(rows), length), dtype=torch.long)
        ids[:, : len(prefix)] = torch.tensor(prefix)
        attention[:, : len(prefix)] = 1
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        named = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        aimed = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        positions: list[list[int]] = []
        row_of: list[int] = []
        drawn: list[bool] = []
        masks: list[Mask] = []
        valid: list[Mask] = []
        for index, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
            used = prompt + answer
            ids[index, length - len(used) :] = torch.tensor(used)
            attention[index, length - len(used) :] = 1
            start = length - len(answer)
            labels[index, start:] = torch.tensor([IGNORED if i in forced else i for i in answer])
            if dense and dense[row.image].annotates_all:
                kinds = self.question_kinds(row.question)
                named[index, length - len(used) : length - len(answer)] = torch.tensor(kinds)
            if row.masks is None:
                continue
            firsts = [start + i for i, token in enumerate(answer) if token == self.first_id]
            if len(firsts) != len(row.masks):
                raise ValueError(
                    f"{len(row.masks)} masks for an answer with {len(firsts)} targets: {row.answer!r}"
                )
            keep = np.ones((self.size, self.size), dtype=bool)
            if row.ignore is not None:
                keep = ~mask_array(row.ignore, self.size)
            if dense and answer:  # a target's last token is where the next word is free again
                free = [start - 1, *(first + len(self.codebook) - 1 for first in firsts)]
                for number, first in enumerate(firsts):
                    aimed[index, free[number] : first] = len(masks) + number
                aimed[index, free[-1] : -1] = NOTHING
            for first, mask in zip(firsts, row.masks, strict=True):
                positions.append(list(range(first, first + len(self.codebook))))
                row_of.append(index)
                drawn.append(row.drawn)
                masks.append(mask_array(mask, self.size))
                valid.append(keep)
        shape = (0, self.size, self.size)
        labelled = [dense_labels(sample, self.categories, self.size) for sample in dense]
        centres = [centre_labels(sample, self.categories, self.grid) for sample in dense]
        return Batch(
            images=self.pixels(images),
            image_of_row=torch.tensor([row.image for row in rows]),
            input_ids=ids,
            attention_mask=attention,
            labels=labels,
            row_of_target=torch.tensor(row_of, dtype=torch.long),
            positions=torch.tensor(positions, dtype=torch.long).view(-1, len(self.codebook)),
            masks=torch.from_numpy(np.stack(masks)).float() if masks else torch.zeros(shape),
            valid=torch.from_numpy(np.stack(valid)).float() if valid else torch.zeros(shape),
            dense=torch.from_numpy(np.stack(labelled)) if labelled else None,
            inventory=self._inventory(rows) if any(row.kinds is not None for row in rows) else None,
            centres=torch.from_numpy(np.stack(centres)) if centres else None,
            named=named if dense else None,
            aimed=aimed if dense else None,
            drawn=None if all(drawn) else torch.tensor(drawn),
        )

    def _inventory(self, rows: Sequence[Row]) -> Tensor:
        counts = torch.full((len(rows), len(self.categories)), IGNORED)
        for index, row in enumerate(rows):
            if row.kinds is not None and set(row.kinds) <= set(self.categories):
                counts[index] = torch.tensor([row.kinds.count(name) for name in self.categories])
        return counts
