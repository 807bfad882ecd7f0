"""Codebook tokens: S x K special tokens a target, and the embedding made of their hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.samples import SEG


def token_names(scales: int, tokens: int) -> list[str]:
    """Names of the S x K special tokens, in the order in which an answer spells a target."""
    return [f"<seg_{scale}_{token}>" for scale in range(scales) for token in range(tokens)]


def spell(answer: str, names: list[str]) -> str:
    """Answer text with `{seg}` -> text with codebook tokens."""
    return answer.replace(SEG, "".join(names))


class Codebook(nn.Module):
    """Hidden states of the codebook tokens and the image's deepest features -> segmentation embeddings.

    The K tokens of a scale are fused by a learned convex combination (PixelLM's token fusion). What comes
    out then looks back at the image once (ours): which of two cups is meant is found by comparing words
    with places, and one attention over the image does that far sooner than a language model learns to
    carry places through its hidden states. docs/experiments.md has the measurement.
    """

    def __init__(
        self, scales: int, tokens: int, hidden: int, width: int, vision: int, told: bool = False
    ) -> None:
        """`told`: the image's cells are told something of width `hidden`, see `popen.model.look.Match`."""
        super().__init__()
        self.scales, self.tokens = scales, tokens
        self.fuse = nn.Parameter(torch.zeros(scales, tokens))
        self.project = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norm = nn.LayerNorm(vision)
        self.query, self.key, self.value = (nn.Linear(n, width) for n in (width, vision, vision))
        self.tell = nn.Linear(hidden, width, bias=False) if told else None

    def forward(
        self, hidden: Tensor, features: Tensor, image_of: Tensor, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, S, K, D), features (B, width, h, w), image_of (N,) in 0..B-1; told (N, P, D), what each
        target's question told the image's tokens.

        Returns the embeddings (N, S, C) and where they looked: logits over the image's cells (N, S, h w).
        """
        embeddings = self.project(torch.einsum("sk,nskd->nsd", self.fuse.softmax(dim=1), hidden))
        cells = self.norm(features.flatten(2).transpose(1, 2).to(embeddings.dtype))
        keys, values = (part(cells).index_select(0, image_of) for part in (self.key, self.value))
        if told is not None and self.tell is not None:
            keys = keys + _spread(self.tell(told), features.shape[-2:])
        looked = self.query(embeddings) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        return embeddings + looked.softmax(dim=-1) @ values, looked


def _spread(tokens: Tensor, size: torch.Size) -> Tensor:
    """What is said of images' tokens (N, P, C) -> of their cells (N, h w, C): squares of them are tokens."""
    side = round(tokens.shape[1] ** 0.5)
    return F.interpolate(tokens.transpose(1, 2).unflatten(2, (side, side)), size).flatten(2).transpose(1, 2)
