"""Refined segmentation embeddings: attention over those that M views of an image give for the same target.

Member 0 is the clean image's. POPEN attends over the members with their preference scores; the form below,
its start at identity included, is ours.

Shapes: N targets, M members, S scales, C decoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RefinementAttention(nn.Module):
    """out = e_0 + gate * V sum_m a_m (e_m - e_0),  a = softmax_m(e_0' A e_m / sqrt(C) + bias * score_m).

    Each scale has its own A, V, bias and gate. The gate starts at 0 (ReZero, Bachlechner et al. 2020), so an
    untrained module returns member 0 exactly; A starts at 0, V at identity and bias at 1, so opening the gate
    to 1 gives the mean of the members weighted by the softmax of their scores. No start is drawn at random. A
    sees normalised embeddings (layer norm without parameters), so that their size does not decide.
    """

    def __init__(self, scales: int, width: int) -> None:
        super().__init__()
        self.affinity = nn.Parameter(torch.zeros(scales, width, width))  # A
        self.value = nn.Parameter(torch.eye(width).repeat(scales, 1, 1))  # V
        self.bias = nn.Parameter(torch.ones(scales))
        self.gate = nn.Parameter(torch.zeros(scales))

    def forward(self, embeddings: Tensor, scores: Tensor) -> Tensor:
        """Refine the clean image's embeddings.

        Args:
            embeddings: (N, M, S, C), member 0 the clean image's.
            scores: (N, M) preference scores; larger is better, only differences matter.

        Returns:
            (N, S, C).
        """
        clean = embeddings[:, 0]
        query, keys = (F.layer_norm(x, x.shape[-1:]) for x in (clean, embeddings))
        logits = torch.einsum("nsc,scd,nmsd->nms", query, self.affinity, keys) / clean.shape[-1] ** 0.5
        logits = logits + self.bias * scores[:, :, None]
        difference = torch.einsum("nms,nmsc->nsc", logits.softmax(1), embeddings - clean[:, None])
        return clean + self.gate[:, None] * torch.einsum("scd,nsd->nsc", self.value, difference)


def mean_embedding(embeddings: Tensor) -> Tensor:
    """Plain mean of the members: (N, M, S, C) -> (N, S, C)."""
    return embeddings.mean(1)


def best_embedding(embeddings: Tensor, scores: Tensor) -> Tensor:
    """The member with the highest score (the first of equals): (N, M, S, C), (N, M) -> (N, S, C)."""
    return embeddings[torch.arange(len(embeddings)), scores.argmax(1)]
