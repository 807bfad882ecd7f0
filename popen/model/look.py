"""The words of a question look at the image before they are read, and those of an answer before they are
said; and each place of the image is told which of a question's words fit it (ours, for language models from
scratch).

"Find the spoons and the cups" asks whether a word's thing is there, and how many of it. A small model
learns that late and badly through its layers; one attention whose target is known learns it soon. So it is
with what to say next: "the left cup" follows from which thing is meant, and the data say which that is.
docs/experiments.md has the measurements.
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

    def remember(
        self, image: Tensor, image_of_row: Tensor, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, P, D), the image of each row (R,) and what its cells are told (R, P, D) -> keys
        (R, P + 1, D), the sink's last, and values (R, P, D)."""
        cells = self.norm_image(image)
        keys = torch.cat([self.key(cells), self.sink.expand(len(image), -1, -1)], dim=1)
        keys = keys.index_select(0, image_of_row)
        if told is not None:
            keys = keys + F.pad(told, (0, 0, 0, 1))
        return keys, self.value(cells).index_select(0, image_of_row)

    def attend(
        self, words: Tensor, keys: Tensor, values: Tensor, shade: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Words (R, T, D) and what `remember` made of their row's image tokens -> words that have looked
        (R, T, D), and where: logits (R, T, P + 1). `shade` (R, T, P) is taken off the image tokens'."""
        looked = self.scores(words, keys)
        if shade is not None:
            looked = looked - F.pad(shade, (0, 1)).to(looked.dtype)
        return words + self.out(looked.softmax(-1)[..., :-1] @ values), looked

    def scores(self, words: Tensor, keys: Tensor) -> Tensor:
        """Words (R, T, D) and keys (R, P + 1, D) -> logits (R, T, P + 1)."""
        return self.query(self.norm_words(words)) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5

    def forward(self, words: Tensor, image: Tensor, image_of_row: Tensor) -> tuple[Tensor, Tensor]:
        """`attend` of words (R, T, D) to their rows' image tokens, of (B, P, D)."""
        return self.attend(words, *self.remember(image, image_of_row))


class Match(nn.Module):
    """Each cell of an image is told which words of the question fit it.

    "The red knife" is the cell that both words fit. For the answer to find it, a language model must have
    carried "red" to where the answer begins, and must know there how red looks; it learns neither before the
    other (docs/experiments.md). What meets the words itself says what they have in common. It is taught where
    the question's targets are: left to what follows from it, it comes to know colours in one training and not
    in another.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_words, self.norm_states, self.norm_image = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.whole = nn.Parameter(torch.zeros(width))

    def forward(
        self, words: Tensor, states: Tensor, question: Tensor, image: Tensor, image_of_row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What cells are told (R, P, D): the sum of the words' values, each as far as it fits, and how well
        the cell fits all of them; and the latter itself: logits (R, P), the sum of the words'.

        Args:
            words: their embeddings (R, T, D).
            states: what the language model made of them (R, T, D), which values are made of: "not red".
            question: which of them ask (R, T).
            image: its tokens (B, P, D).
            image_of_row: (R,).
        """
        cells = self.key(self.norm_image(image)).index_select(0, image_of_row)
        alike = cells @ self.query(self.norm_words(words)).transpose(1, 2) * cells.shape[-1] ** -0.5
        asks = question[:, None].to(alike.dtype)
        # most words fit most cells little: a cell starts with a part of all
        told = ((alike - 1).sigmoid() * asks) @ self.value(self.norm_states(states))
        fits = (alike * asks).sum(-1, dtype=torch.float32)  # of many words: in bfloat16 a step is a tenth
        return told + (fits.unsqueeze(-1) * self.whole).to(told.dtype), fits


class Aim(Look):
    """Look of an answer, which passes by what it has named.

    Without a record of what was said about, a small model names a thing twice and forgets another. So each
    target that is named leaves a shade on the image tokens that were looked at when it was (the coverage of
    See et al. 2017, here taken off the logits).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.fade = nn.Parameter(torch.tensor(2.0))

    @staticmethod
    def named(looked: Tensor) -> Tensor:
        """Logits (..., P + 1) of a look at the moment that a target is named -> what is named (..., P): each
        image token's share, as a part of the largest."""
        shares = looked.float().softmax(-1)
        return shares[..., :-1] / shares.amax(-1, keepdim=True)

    def pass_by(
        self, words: Tensor, image: Tensor, image_of_row: Tensor, naming: Tensor, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` of all words of answers; `naming` (R, T) is where the next token is a target's first,
        `told` is as for `remember`."""
        keys, values = self.remember(image, image_of_row, told)
        named = self.named(self.scores(words, keys)) * naming.unsqueeze(-1)
        return self.attend(words, keys, values, self.fade * (named.cumsum(1) - named))


def look_loss(looked: Tensor, named: Tensor, image_of_row: Tensor, dense: Tensor) -> Tensor:
    """Cross-entropy of where words look against each image token's share of what they name.

    looked (R, T, P + 1) logits; named (R, T), the kind that a word names, NOTHING or IGNORED; dense (B, H, W)
    labels of the images' pixels (kind k is 1 + k). A word that names no kind, or one of which the image shows
    nothing, should look at the sink. Sum of the means over words that name a kind and over those that do not.
    """
    rows, places = (named >= 0).nonzero(as_tuple=True)
    shown = dense[image_of_row[rows]] == 1 + named[rows, places][:, None, None]
    cells = _cells(shown.float(), looked)
    return _means(_aims(looked[rows, places], cells), _aims(looked[named == NOTHING], None))


def aim_loss(looked: Tensor, aimed: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of where the answer looks before each of its words against the target it comes to.

    looked (R, T, P + 1) logits; aimed (R, T), the number of the batch's target that is named next, NOTHING
    behind the last one, or IGNORED; masks (N, H, W) of the targets. Sum of the means over both.
    """
    rows, places = (aimed >= 0).nonzero(as_tuple=True)
    cells = _cells(masks, looked)[aimed[rows, places]]  # many words come to one target
    return _means(_aims(looked[rows, places], cells), _aims(looked[aimed == NOTHING], None))


def match_loss(fits: Tensor, row_of_target: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of which cells a question's words fit, logits (R, P), against the cells' shares of its
    targets, masks (N, H, W) of rows (N,). Mean over the questions with a pixel to find."""
    shown = masks.new_zeros((len(fits), *masks.shape[1:])).index_add_(0, row_of_target, masks)
    cells = F.adaptive_avg_pool2d(shown.clamp(max=1), round(fits.shape[-1] ** 0.5)).flatten(1)
    total = cells.sum(1, keepdim=True)
    losses = -(cells / total.clamp(min=1e-6) * fits.float().log_softmax(-1)).sum(1)
    return _means(losses[total[:, 0] > 0])


def _cells(shown: Tensor, looked: Tensor) -> Tensor:
    """What is shown (n, H, W) -> its share of each of the cells that looks (..., P + 1) know (n, P)."""
    return F.adaptive_avg_pool2d(shown, round((looked.shape[-1] - 1) ** 0.5)).flatten(1)


def _aims(looked: Tensor, cells: Tensor | None) -> Tensor:
    """Cross-entropy of looks (n, P + 1) against the cells' shares of what is shown (n, P), and against the
    sink where nothing is."""
    logps = looked.float().log_softmax(-1)
    if cells is None:
        return -logps[:, -1]
    total = cells.sum(1, keepdim=True)
    true = torch.cat([cells / total.clamp(min=1e-6), (total == 0).float()], dim=1)
    return -(true * logps).sum(1)


def _means(*parts: Tensor) -> Tensor:
    """Sum of the means of some losses (n,), each over what all processes have of it."""
    return torch.stack([part.sum() / max(len(part), 1) * share(len(part)) for part in parts]).sum()
