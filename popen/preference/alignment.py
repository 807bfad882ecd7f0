"""L_pre = L_t + L_s + anchor x SFT loss, over batches of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from popen.data.images import open_image
from popen.masks import decode
from popen.model import IGNORED
from popen.model.batches import Batch, Row
from popen.model.losses import sft_loss, token_logps
from popen.model.segmenter import Output, Segmenter
from popen.params import AlignParams, SftWeights
from popen.preference.losses import embedding_loss, mask_loss, text_loss, weighted_logp
from popen.preference.records import MaskPairs, TextPair


@dataclass(frozen=True)
class PreferenceBatch:
    """Q corrected answers, then Q sampled ones, as rows of one batch; only the corrected ones carry masks."""

    batch: Batch
    changed: Tensor  # (2Q, T) bool
    reference: Tensor  # (2Q, T) log p under the reference, 0 outside the answers
    differs: Tensor  # (Q,) bool: the two answers of a question differ
    fewer: Tensor  # (Q,) bool: the corrected one names fewer things
    pairs: MaskPairs  # P mask pairs
    target_of_pair: Tensor  # (P,) index into the batch's N targets

    def to(self, device: torch.device | str) -> PreferenceBatch:
        moved = {k: v.to(device) for k, v in vars(self).items() if k != "pairs"}
        return PreferenceBatch(pairs=self.pairs.to(device), **moved)


def chosen_rows(pairs: Sequence[TextPair]) -> list[Row]:
    """The corrected answers with the true masks of their targets, one image a pair; words alone where the
    masks are not known."""
    masks = [[decode(target.rle) for target in pair.targets] if pair.known else None for pair in pairs]
    ignore = [None if pair.ignore is None else decode(pair.ignore) for pair in pairs]
    return [
        Row(index, pair.question, pair.chosen, masks[index], ignore[index])
        for index, pair in enumerate(pairs)
    ]


def collate_chosen(model: Segmenter, root: Path, max_pixels: int) -> Callable[[Sequence[TextPair]], Batch]:
    """A function: text pairs -> a supervised batch of their corrected answers (the control `chosen`)."""

    def make(pairs: Sequence[TextPair]) -> Batch:
        return model.encoder.batch(
            [open_image(root, pair.image, max_pixels) for pair in pairs], chosen_rows(pairs)
        )

    return make


def collate(
    model: Segmenter, root: Path, max_pixels: int, masks: MaskPairs
) -> Callable[[Sequence[TextPair]], PreferenceBatch]:
    """A function: text pairs, with the mask pairs of their questions -> one batch."""
    by_uid = masks.of_uid()

    def make(pairs: Sequence[TextPair]) -> PreferenceBatch:
        images = [open_image(root, pair.image, max_pixels) for pair in pairs]
        rows = chosen_rows(pairs)
        rows += [Row(index, pair.question, pair.rejected) for index, pair in enumerate(pairs)]
        batch = model.encoder.batch(images, rows)
        shape = batch.labels.shape
        changed, reference = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        marks = [pair.chosen_changed for pair in pairs] + [pair.rejected_changed for pair in pairs]
        logps = [pair.chosen_ref for pair in pairs] + [pair.rejected_ref for pair in pairs]
        for row, (mark, logp) in enumerate(zip(marks, logps, strict=True)):
            changed[row, -len(mark) :] = torch.tensor(mark)
            reference[row, -len(logp) :] = torch.tensor(logp)
        first = [
            batch.row_of_target.tolist().index(row) if pair.targets else 0 for row, pair in enumerate(pairs)
        ]
        numbers = [n for pair in pairs for n in by_uid.get(pair.uid, ())]
        places = [
            first[row] + masks.targets[n] for row, pair in enumerate(pairs) for n in by_uid.get(pair.uid, ())
        ]
        return PreferenceBatch(
            batch,
            changed,
            reference,
            torch.tensor([pair.differs for pair in pairs]),
            torch.tensor([pair.fewer for pair in pairs]),
            masks.pick(numbers),
            torch.tensor(places, dtype=torch.long),
        )

    return make


def winners(batch: PreferenceBatch) -> Batch:
    """The corrected answers alone, supervised: the rows of the `chosen` control and of the anchor."""
    return batch.batch.first_rows(len(batch.differs))


def preference_loss(
    output: Output, batch: PreferenceBatch, params: AlignParams
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """L_t + L_s, weighted, and TRL-style metrics.

    Unless `params.fewer`, L_t leaves out the pairs whose corrected answer names fewer things (ours): pushing
    their sampled answer down pushes mentions down, the right ones with the wrong.
    """
    half = len(batch.differs)
    compared = batch.differs if params.fewer else batch.differs & ~batch.fewer
    answered = batch.batch.labels != IGNORED
    logps = token_logps(output.logits, batch.batch)
    policy = weighted_logp(logps, batch.changed, answered, params.gamma)
    reference = weighted_logp(batch.reference, batch.changed, answered, params.gamma)
    chosen, rejected = (values[compared] for values in policy.split(half))
    chosen_ref, rejected_ref = (values[compared] for values in reference.split(half))
    loss_t, metrics = text_loss(chosen, rejected, chosen_ref, rejected_ref, params.beta_t)
    at, pairs = batch.target_of_pair, batch.pairs
    if params.mask_form == "embedding":
        loss_s, more = embedding_loss(
            output.embeddings[at], pairs.winner, pairs.loser, pairs.reference, params.beta_s
        )
    else:
        loss_s, more = mask_loss(
            output.masks[at],
            pairs.reference_masks.float(),
            pairs.winner_masks,
            pairs.loser_masks,
            params.beta_s,
        )
    parts = {"L_t": loss_t.detach(), "L_s": loss_s.detach(), **metrics, **more}
    return params.text * loss_t + params.mask * loss_s, cast(dict[str, Tensor | float], parts)


def align_loss(
    params: AlignParams, weights: SftWeights
) -> Callable[[nn.Module, PreferenceBatch], tuple[Tensor, dict]]:
    """L_pre with the anchor on the corrected answers and their masks."""

    def loss(model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, dict]:
        output = model(batch.batch)
        total, parts = preference_loss(output, batch, params)
        anchor, more = sft_loss(anchor_output(output, batch), winners(batch), weights)
        parts |= {f"anchor_{name}": value for name, value in more.items()}
        return total + params.anchor * anchor, parts

    return loss


def anchor_output(output: Output, batch: PreferenceBatch) -> Output:
    """The part of the output that belongs to the corrected answers (they come first)."""
    tokens = int(batch.batch.answered[: len(batch.differs)].sum())
    return Output(output.logits[:tokens], output.embeddings, output.masks, looked=output.looked)
