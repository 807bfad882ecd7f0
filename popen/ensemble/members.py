"""The ensemble at work: M members answer, the best text is kept, the members' embeddings refine its masks.

1. Member 0 answers greedily, the others sample, all from the clean image: noise in it costs more quality than
   it adds variety (docs/experiments.md).
2. Every answer is scored (`popen.ensemble.score`); the best one is the ensemble's text.
3. That text is fed with every member's image (perturbed, but for member 0's), so that the M embeddings of a
   target are aligned.
4. Attention over them refines the clean image's embedding; its mask is decoded from the clean image.

Shapes: R questions, M members, N targets of the kept answers (flat), S scales, C width, H W mask size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from popen.ensemble.attention import RefinementAttention, best_embedding, mean_embedding
from popen.ensemble.score import FEATURES, Score, agreement
from popen.evaluation.answering import mask_confidence
from popen.model import IGNORED
from popen.model.batches import Batch, Row
from popen.model.generate import Answer, generate_members
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.model.speech import Member
from popen.params import EnsembleParams
from popen.preference.masks import noise_rectangles

# Images of the members' that a GPU reads in one pass: what the language model keeps of them, twice for a
# moment, is 16 GiB for LLaVA-1.5-7B and 25 for 13B (computed).
IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Members:
    """What M members say to R questions about as many images."""

    answers: list[list[Answer]]  # M lists of R
    features: np.ndarray[Any, np.dtype[np.float64]]  # (R, M, F), see `score.FEATURES` and `score.REWARD`


@torch.no_grad()
def ask(
    model: Segmenter,
    reference: Segmenter | None,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    params: EnsembleParams,
    members: int,
    max_new_tokens: int,
    threshold: float,
    seed: int,
) -> Members:
    """Let `members` answer each question about its image. With a `reference`, the model before alignment,
    their features are REWARD, else FEATURES."""
    rows = [Row(index, question) for index, question in enumerate(questions)]
    drawn = [Member(params.temperature * (number > 0), seed + number) for number in range(members)]
    answers = generate_members(model, images, rows, max_new_tokens, drawn)
    if reference is None:
        told = [_features([said[row] for said in answers], threshold) for row in range(len(rows))]
        features = np.array(told).reshape(len(rows), members, len(FEATURES))
    else:
        rewards = [implicit_rewards(model, reference, images, questions, said) for said in answers]
        features = np.array(rewards).T[..., None]
    return Members(answers, features)


def _features(said: Sequence[Answer], threshold: float) -> list[tuple[float, ...]]:
    """FEATURES of the members' answers to one question."""
    agreed = agreement([answer.masks > threshold for answer in said])
    sure = [float(mask_confidence(a.masks, threshold).mean()) if len(a.masks) else 0.0 for a in said]
    return list(zip([answer.logp for answer in said], sure, agreed, strict=True))


@torch.no_grad()
def implicit_rewards(
    model: Segmenter,
    reference: Segmenter,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    answers: Sequence[Answer],
) -> list[float]:
    """Each answer's implicit reward of DPO without its beta: mean log pi - log pi_ref of its tokens, clean
    image."""
    rows = [
        Row(i, question, answer.text)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    batch = model.encoder.batch(images, rows).to(model.device)
    counts = (batch.labels != IGNORED).sum(1).clamp(min=1)
    means = [token_logps(net(batch).logits, batch).sum(1) / counts for net in (model, reference)]
    return (means[0] - means[1]).tolist()


def copies(clean: Tensor, params: EnsembleParams, members: int, seed: int) -> Tensor:
    """Images (R, 3, H, W) -> what each member sees (M, R, 3, H, W): member 0 the images, each other one noise
    in a rectangle of them."""
    views = [clean]
    for member in range(1, members):
        generator = torch.Generator().manual_seed(seed + member)
        views.append(noise_rectangles(clean, 1, 1, params.sigma, params.side, generator))
    return torch.stack(views)


@dataclass(frozen=True)
class Aligned:
    """The kept answers of R questions, their targets seen by every member."""

    batch: Batch  # rows of the kept answers; its masks are placeholders
    embeddings: Tensor  # (N, M, S, C)
    views: Tensor  # (M, R, 3, H, W), what each member sees
    features: list[list[Tensor]]  # M times the tower's levels of it
    scores: Tensor  # (N, M), the score of the member's own answer


@torch.no_grad()
def align(
    model: Segmenter,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    texts: Sequence[str],
    pixels: Tensor,
    scores: np.ndarray[Any, np.dtype[np.float64]],
    at_once: int = 1,
) -> Aligned:
    """Feed each question's text with every member's image: `pixels` (M, R, 3, H, W), `scores` (R, M).

    `at_once` members' images are read in one pass: the same up to rounding, for so many times the memory. A
    GPU takes less time for it, a CPU more.
    """
    size = model.encoder.size
    rows = [
        Row(i, question, text, [np.zeros((size, size), dtype=bool)] * text.count("{seg}"))
        for i, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]
    batch, pixels = model.encoder.batch(images, rows).to(model.device), pixels.to(model.device)
    by_row = torch.from_numpy(scores).float().to(model.device)
    features, embeddings = list[list[Tensor]](), list[Tensor]()
    for views in pixels.split(at_once):
        every = batch.repeated(views)
        levels = model.tower(every.images)
        found = model.embed(every, levels)
        features += [list(view) for view in zip(*(level.split(len(images)) for level in levels), strict=True)]
        embeddings.append(found.view(len(views), len(batch.row_of_target), *found.shape[1:]))
    return Aligned(
        batch, torch.cat(embeddings).transpose(0, 1), pixels, features, by_row[batch.row_of_target]
    )


def refine(model: Segmenter, attention: RefinementAttention, aligned: Aligned, mode: str) -> Tensor:
    """Mask logits (N, H, W) of the kept answers.

    `mode`: "attention" (the method), "mean" of the embeddings, "best" (the best-scored member's
    embedding), "probability" (mean of the members' own mask probabilities).
    """
    batch, clean = aligned.batch, aligned.features[0]
    if mode == "probability":
        members = [
            model.decode(aligned.embeddings[:, m], levels, views, batch.image_of_target)
            for m, (levels, views) in enumerate(zip(aligned.features, aligned.views, strict=True))
        ]
        return torch.stack(members).sigmoid().mean(0).clamp(1e-6, 1 - 1e-6).logit()
    if mode == "attention":
        embeddings = attention(aligned.embeddings, aligned.scores)
    elif mode == "mean":
        embeddings = mean_embedding(aligned.embeddings)
    else:
        embeddings = best_embedding(aligned.embeddings, aligned.scores)
    return model.decode(embeddings, clean, batch.images, batch.image_of_target)


@dataclass(frozen=True)
class Ensemble:
    """A calibrated ensemble around one model."""

    model: Segmenter
    reference: Segmenter | None  # for a score that is the implicit reward
    score: Score
    attention: RefinementAttention
    params: EnsembleParams
    threshold: float

    def to(self, device: torch.device) -> Ensemble:
        """This ensemble with its models moved to `device`."""
        for part in (self.model, self.reference, self.attention):
            if part is not None:
                part.to(device)
        return self

    def answer(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        members: int,
        max_new_tokens: int,
        seed: int,
    ) -> list[Answer]:
        """One refined answer a question (question i is about image i)."""
        return self.refined(*self.gather(images, questions, members, max_new_tokens, seed), self.params.mode)

    @torch.no_grad()
    def gather(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        members: int,
        max_new_tokens: int,
        seed: int,
    ) -> tuple[list[Answer], Aligned]:
        """The kept answer to each question, not refined yet, and its targets as every member sees them."""
        said = ask(
            self.model,
            self.reference,
            images,
            questions,
            self.params,
            members,
            max_new_tokens,
            self.threshold,
            seed,
        )
        scores = self.score(said.features)
        kept = [said.answers[best][row] for row, best in enumerate(scores.argmax(1).tolist())]
        texts = [answer.text for answer in kept]
        pixels = copies(self.model.encoder.pixels(images), self.params, members, seed)
        at_once = 1 if self.model.device.type == "cpu" else max(1, IMAGES_AT_ONCE // len(images))
        aligned = align(self.model, images, questions, texts, pixels, scores, at_once)
        return kept, aligned

    @torch.no_grad()
    def refined(self, kept: Sequence[Answer], aligned: Aligned, mode: str) -> list[Answer]:
        """The kept answers with the masks that `mode` makes of their members (see `refine`)."""
        masks = refine(self.model, self.attention, aligned, mode)
        counts = [answer.text.count("{seg}") for answer in kept]
        parts = zip(kept, masks.split(counts), aligned.embeddings[:, 0].split(counts), strict=True)
        return [Answer(a.text, a.token_ids, a.logp, embedding, mask, a.ended) for a, mask, embedding in parts]


def save(folder: Path, score: Score, attention: RefinementAttention) -> None:
    """Write score.json and attention.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(score.to_dict(), indent=1) + "\n", encoding="utf-8")
    save_file(attention.state_dict(), folder / "attention.safetensors")


def load(folder: Path, model: Segmenter) -> tuple[Score, RefinementAttention]:
    """Read what `save` wrote."""
    score = Score.from_dict(json.loads((folder / "score.json").read_text(encoding="utf-8")))
    attention = RefinementAttention(model.codebook.scales, model.params.decoder.width)
    attention.load_state_dict(load_file(folder / "attention.safetensors"))
    return score, attention.eval()
