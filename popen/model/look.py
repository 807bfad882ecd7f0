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
from popen.model import IGNORED

NOTHING = -1  # label of a word that names no kind


class Look(nn.Module):
    """Attention from words to image tokens, or to a sink for words of which the image has nothing.

    It starts as the identity, and is the identity for a word that looks at the sink.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_words, self.norm_image = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.sink = nn.Parameter(torch.zeros(1, 1, width))
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Words (R, T, D) and their row's image tokens (R, P, D) -> words that have looked (R, T, D), and
        where: logits (R, T, P + 1), the sink's last."""
        cells = self.norm_image(image)
        keys = torch.cat([self.key(cells), self.sink.expand(len(image), -1, -1)], dim=1)
        looked = self.query(self.norm_words(words)) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        return words + self.out(looked.softmax(-1)[..., :-1] @ self.value(cells)), looked


def look_loss(looked: Tensor, kinds: Tensor, dense: Tensor) -> Tensor:
    """Cross-entropy of where words look against each image token's share of what they name.

    looked (R, T, P + 1) logits; kinds (R, T) of the words, NOTHING or IGNORED; dense (R, H, W) labels of the
    image's pixels (kind k is 1 + k). A word that names no kind, or one of which the image shows nothing,
    should look at the sink. Sum of the means over words that name a kind and over those that do not.
    """
    rows, places = (kinds != IGNORED).nonzero(as_tuple=True)
    named = kinds[rows, places]
    grid = round((looked.shape[-1] - 1) ** 0.5)
    shown = (dense[rows] == 1 + named[:, None, None]) & (named != NOTHING)[:, None, None]
    cells = F.adaptive_avg_pool2d(shown.float(), grid).flatten(1)
    total = cells.sum(1, keepdim=True)
    true = torch.cat([cells / total.clamp(min=1e-6), (total == 0).float()], dim=1)
    loss = -(true * looked[rows, places].float().log_softmax(-1)).sum(1)
    parts = [loss[named != NOTHING], loss[named == NOTHING]]
    return torch.stack([part.sum() / max(len(part), 1) * share(len(part)) for part in parts]).sum()
