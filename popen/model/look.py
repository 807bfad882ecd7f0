"""The words of a question look at the image before they are read, and those of an answer before they are
said (ours, for language models from scratch).

"Find the spoons and the cups" asks whether a word's thing is there, and how many of it. A small model
learns that late and badly through its layers; one attention whose target is known learns it soon. So it is
with what to say next: "the left cup" follows from which thing is meant, and the data say which that is.
docs/results.md has the measurements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popen.devices import share

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

    def remember(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (R, P, D) -> keys (R, P + 1, D), the sink's last, and values (R, P, D)."""
        cells = self.norm_image(image)
        return torch.cat([self.key(cells), self.sink.expand(len(image), -1, -1)], dim=1), self.value(cells)

    def attend(self, words: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Words (R, T, D) and what `remember` made of their row's image tokens -> words that have looked
        (R, T, D), and where: logits (R, T, P + 1)."""
        looked = self.query(self.norm_words(words)) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        return words + self.out(looked.softmax(-1)[..., :-1] @ values), looked

    def forward(self, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """`attend` of words (R, T, D) to image tokens (R, P, D)."""
        return self.attend(words, *self.remember(image))


def look_loss(looked: Tensor, named: Tensor, image_of_row: Tensor, dense: Tensor) -> Tensor:
    """Cross-entropy of where words look against each image token's share of what they name.

    looked (R, T, P + 1) logits; named (R, T), the kind that a word names, NOTHING or IGNORED; dense (B, H, W)
    labels of the images' pixels (kind k is 1 + k). A word that names no kind, or one of which the image shows
    nothing, should look at the sink. Sum of the means over words that name a kind and over those that do not.
    """
    rows, places = (named >= 0).nonzero(as_tuple=True)
    shown = dense[image_of_row[rows]] == 1 + named[rows, places][:, None, None]
    parts = [_aims(looked[rows, places], shown), _aims(looked[named == NOTHING], None)]
    return torch.stack([part.sum() / max(len(part), 1) * share(len(part)) for part in parts]).sum()


def aim_loss(looked: Tensor, aimed: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of where the answer looks before each of its words against the target it comes to.

    looked (R, T, P + 1) logits; aimed (R, T), the number of the batch's target that is named next, NOTHING
    behind the last one, or IGNORED; masks (N, H, W) of the targets. Sum of the means over both.
    """
    rows, places = (aimed >= 0).nonzero(as_tuple=True)
    parts = [_aims(looked[rows, places], masks[aimed[rows, places]]), _aims(looked[aimed == NOTHING], None)]
    return torch.stack([part.sum() / max(len(part), 1) * share(len(part)) for part in parts]).sum()


def _aims(looked: Tensor, shown: Tensor | None) -> Tensor:
    """Cross-entropy of looks (n, P + 1) against the cells' shares of what is shown (n, H, W), and against the
    sink where nothing is."""
    logps = looked.float().log_softmax(-1)
    if shown is None:
        return -logps[:, -1]
    cells = F.adaptive_avg_pool2d(shown.float(), round((looked.shape[-1] - 1) ** 0.5)).flatten(1)
    total = cells.sum(1, keepdim=True)
    true = torch.cat([cells / total.clamp(min=1e-6), (total == 0).float()], dim=1)
    return -(true * logps).sum(1)
