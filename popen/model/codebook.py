"""Codebook tokens: S x K special tokens a target, and the embedding made of their hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from popen.samples import SEG


def token_names(scales: int, tokens: int) -> list[str]:
    """Names of the S x K special tokens, in the order in which an answer spells a target."""
    return [f"<seg_{scale}_{token}>" for scale in range(scales) for token in range(tokens)]


def spell(answer: str, names: list[str]) -> str:
    """Answer text with `{seg}` -> text with codebook tokens."""
    return answer.replace(SEG, "".join(names))


class Codebook(nn.Module):
    """Hidden states of the codebook tokens (N, S, K, D) -> segmentation embeddings (N, S, C).

    The K tokens of a scale are fused by a learned convex combination (PixelLM's token fusion).
    """

    def __init__(self, scales: int, tokens: int, hidden: int, width: int) -> None:
        super().__init__()
        self.scales, self.tokens = scales, tokens
        self.fuse = nn.Parameter(torch.zeros(scales, tokens))
        self.project = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.fuse.softmax(dim=1)
        return self.project(torch.einsum("sk,nskd->nsd", weights, hidden))
