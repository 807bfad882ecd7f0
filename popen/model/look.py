"""The words of a question look at the image before they are read (ours, for language models from scratch).

"Find the spoons and the cups" asks whether a word's thing is there, and how many of it. A small model
learns that late and badly through its layers; one attention whose target is known learns it soon.
docs/results.md has the measurement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.devices import share

HEADS = 4


class Look(nn.Module):
    """Attention from words to image tokens, and to a sink for words of which the image has nothing.

    It starts as the identity. Where its first head looks can be taught (`look_loss`).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = HEADS if width % HEADS == 0 else 1
        self.norm_words, self.norm_image = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.kv, self.out = (nn.Linear(width, n) for n in (width, 2 * width, width))
        self.sink = nn.Parameter(torch.zeros(1, 1, 2 * width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _parts(self, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, T, D) and (R, P, D) -> queries (R, heads, T, d), keys and values (R, heads, P + 1, d)."""
        kv = torch.cat([self.kv(self.norm_image(image)), self.sink.expand(len(image), -1, -1)], dim=1)
        every = (self.query(self.norm_words(words)), *kv.chunk(2, dim=-1))
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in every)
        return queries, keys, values

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        """Words (R, T, D), their row's image tokens (R, P, D) -> words that have looked (R, T, D)."""
        seen = F.scaled_dot_product_attention(*self._parts(words, image))
        return words + self.out(seen.transpose(1, 2).flatten(2))

    def where(self, words: Tensor, image: Tensor) -> Tensor:
        """Where single words (n, D) look at their image tokens (n, P, D): logits of the first head
        (n, P + 1), the sink's last."""
        queries, keys, _ = self._parts(words[:, None], image)
        return (queries[:, :1] @ keys[:, :1].transpose(2, 3))[:, 0, 0] * queries.shape[-1] ** -0.5


def look_loss(looked: Tensor, kinds: Tensor, dense: Tensor) -> Tensor:
    """Cross-entropy of where words look against each token's share of what they name.

    looked (n, P + 1) logits, kinds (n,) of the words, dense (n, H, W) labels of their image's pixels (kind k
    is 1 + k). A word of which the image shows nothing should look at the sink.
    """
    if not len(looked):
        share(0)
        return looked.sum()
    grid = round((looked.shape[-1] - 1) ** 0.5)
    shown = (dense == 1 + kinds[:, None, None]).float()
    cells = F.adaptive_avg_pool2d(shown, grid).flatten(1)
    total = cells.sum(1, keepdim=True)
    true = torch.cat([cells / total.clamp(min=1e-6), (total == 0).float()], dim=1)
    return -(true * looked.float().log_softmax(-1)).sum(1).mean() * share(len(looked))
