"""Making preference data: answers sampled from the reference, and its masks under perturbed images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from popen import devices
from popen.data.images import open_image
from popen.masks import decode
from popen.model.batches import Row
from popen.model.dense import mask_array
from popen.model.generate import Answer, generate_members
from popen.model.losses import token_logps
from popen.model.segmenter import Segmenter
from popen.model.speech import Member
from popen.params import MaskPreferenceParams, TextPreferenceParams
from popen.parts import Parts, in_batches
from popen.preference.alignment import chosen_rows
from popen.preference.masks import noise_rectangles, rank
from popen.preference.records import MaskPairs, Skipped, TextPair
from popen.preference.sources import Skip, Source, first_wrong
from popen.preference.text import Correction, changed_spans, correct
from popen.samples import Sample

CUT_OFF = "cut off at max_new_tokens"  # why an answer made no pair


class PairsError(ValueError):
    """No preference data can be made; the message says which parameters to change."""


def rule(answers: Sequence[Answer], sample: Sample, skip: Skip) -> tuple[str, Correction] | None:
    """The source of corrections that knows the ground truth: `popen.preference.text.correct`."""
    return first_wrong((said.text, correct(said.text, sample, _drawn(said, sample))) for said in answers)


def text_pairs(
    model: Segmenter,
    root: Path,
    samples: Sequence[Sample],
    params: TextPreferenceParams,
    batch: int,
    max_new_tokens: int,
    max_pixels: int,
    seed: int,
    source: Source = rule,
    parts: Parts[TextPair | Skipped] | None = None,
    bf16: bool = False,
) -> Iterator[TextPair | Skipped]:
    """P_t: of `params.samples` answers a question, the first wrong one (else the first), corrected by the
    source. Answers that it has no correction for are yielded as Skipped; a question may give no pair.

    Answers that were cut off are left out, for their correction would end where the model had not: it would
    teach to stop there. Where no other is left they are Skipped.

    `parts` shares the batches among processes and keeps them (see `popen.parts.in_batches`). With `bf16` the
    reference values are of a pass in bfloat16, as the policy's will be.
    """
    encoder = model.encoder

    @torch.no_grad()
    def pairs_from(start: int) -> Iterator[TextPair | Skipped]:
        part = samples[start : start + batch]
        images = [open_image(root, sample.image, max_pixels) for sample in part]
        asked = [Row(index, sample.question) for index, sample in enumerate(part)]
        first = seed + start * params.samples
        draws = [Member(params.temperature, first + draw) for draw in range(params.samples)]
        drawn = generate_members(model, images, asked, max_new_tokens, draws)
        skipped: list[Skipped] = []
        found = []
        for *answers, sample in zip(*drawn, part, strict=True):
            ended = [said for said in answers if said.ended]
            if not ended:
                texts = dict.fromkeys(said.text for said in answers)
                skipped += [Skipped(sample.uid, text, CUT_OFF) for text in texts]
            found.append(source(ended, sample, skipped.append))
        yield from skipped
        kept = [(row, sample, *pair) for row, sample, pair in zip(asked, part, found, strict=True) if pair]
        if not kept:
            return
        rows = [Row(row.image, row.question, fix.answer) for row, _, _, fix in kept]
        rows += [Row(row.image, row.question, text) for row, _, text, _ in kept]
        encoded = encoder.batch(images, rows).to(model.device)
        with devices.autocast(bf16):
            logps = token_logps(model(encoded).logits, encoded).cpu()
        for index, (_, sample, text, fix) in enumerate(kept):
            chosen, rejected = encoder.answer_ids(fix.answer), encoder.answer_ids(text)
            marks = changed_spans(chosen, rejected)
            yield TextPair(
                uid=sample.uid,
                image=sample.image,
                question=sample.question,
                chosen=fix.answer,
                rejected=text,
                targets=fix.targets,
                chosen_changed=marks[0],
                rejected_changed=marks[1],
                chosen_ref=logps[index, -len(chosen) :].tolist(),
                rejected_ref=logps[len(kept) + index, -len(rejected) :].tolist(),
                ignore=sample.ignore,
            )

    return in_batches(range(0, len(samples), batch), pairs_from, "text_preferences", parts)


def mask_pairs(
    model: Segmenter,
    root: Path,
    pairs: Sequence[TextPair],
    params: MaskPreferenceParams,
    batch: int,
    max_pixels: int,
    seed: int,
    keep_masks: bool,
    parts: Parts[MaskPair] | None = None,
    bf16: bool = False,
) -> dict[str, MaskPairs]:
    """P_s: K perturbed images answer with the corrected text; each target's masks are ranked by IoU.

    "coarse" pairs high with low, "fine" high with medium. Masks are ranked as the perturbed images' own
    features decode them; a winner must beat the clean image's mask. With `keep_masks` the pairs hold them:
    the mask form of L_s compares them, the embedding form does not. Raises PairsError where no target gives
    a pair for one of the two. `parts` and `bf16` are as for `text_pairs`; processes beside the main one
    return nothing.
    """
    asked = [pair for pair in pairs if pair.targets]
    copies = params.perturbed
    kept = slice(None) if keep_masks else slice(0)

    @torch.no_grad()
    def pairs_from(start: int) -> Iterator[MaskPair]:
        part = asked[start : start + batch]
        images = [open_image(root, pair.image, max_pixels) for pair in part]
        encoded = model.encoder.batch(images, chosen_rows(part)).to(model.device)
        generator = torch.Generator().manual_seed(seed + start)
        noisy = noise_rectangles(
            encoded.images, copies, params.rectangles, params.sigma, params.side, generator
        )
        with devices.autocast(bf16):
            clean = model(encoded)
            views = [model(encoded.with_images(noisy[copy::copies])) for copy in range(copies)]
        embeddings = torch.stack([view.embeddings for view in views])  # (K, N, S, C)
        # no mask holds an ignored pixel: none counts here, and winner and loser do not differ there (L_s)
        valid = encoded.valid > 0
        masks = (torch.stack([view.masks for view in views]) > 0) & valid  # (K, N, H, W)
        truth = (encoded.masks > 0) & valid
        ious = _ious(masks, truth[None])
        clean_ious = _ious((clean.masks > 0) & valid, truth)
        areas = masks.flatten(2).sum(2)
        place = _place_in_row(encoded.row_of_target.tolist())
        for target, row in enumerate(encoded.row_of_target.tolist()):
            ranks = rank(
                ious[:, target].tolist(),
                areas[:, target].tolist(),
                params.margin,
                params.area_ratio,
                float(clean_ious[target]),
            )
            if ranks is None:
                continue
            for stage, loser in (("coarse", ranks.low), ("fine", ranks.medium)):
                if loser is None:
                    continue
                values = {
                    "winner": embeddings[ranks.high, target].float(),
                    "loser": embeddings[loser, target].float(),
                    "reference": clean.embeddings[target].float(),
                    "winner_masks": masks[ranks.high, target, kept, kept],
                    "loser_masks": masks[loser, target, kept, kept],
                    "reference_masks": clean.masks[target, kept, kept].half(),
                    "ious": torch.stack([ious[ranks.high, target], ious[loser, target], clean_ious[target]]),
                }
                # copies: a view would keep, and write, all that the batch computed
                yield MaskPair(
                    stage,
                    part[row].uid,
                    place[target],
                    {name: value.to("cpu", copy=True) for name, value in values.items()},
                )

    found = list(in_batches(range(0, len(asked), batch), pairs_from, "mask_preferences", parts))
    if parts is not None and not devices.is_main():
        return {}
    return {
        stage: _stacked(stage, [pair for pair in found if pair.stage == stage])
        for stage in ("coarse", "fine")
    }


class MaskPair(NamedTuple):
    """One of P_s, before they are stacked."""

    stage: str
    uid: str
    target: int
    values: dict[str, torch.Tensor]


def write_mask_pairs(path: Path, pairs: Sequence[MaskPair]) -> None:
    """Keep the pairs of a batch in one file."""
    torch.save([tuple(pair) for pair in pairs], path)


def read_mask_pairs(path: Path) -> list[MaskPair]:
    """Read what `write_mask_pairs` wrote."""
    return [MaskPair(*fields) for fields in torch.load(path, weights_only=True)]


def _stacked(stage: str, pairs: Sequence[MaskPair]) -> MaskPairs:
    if not pairs:
        raise PairsError(
            f"mask_preferences: no target gives a pair ({stage}); raise mask_preferences.sigma or"
            " .area_ratio, or lower .margin"
        )
    values = {name: torch.stack([pair.values[name] for pair in pairs]) for name in pairs[0].values}
    return MaskPairs([pair.uid for pair in pairs], [pair.target for pair in pairs], **values)


def _drawn(said: Answer, sample: Sample) -> list[list[float]]:
    """IoU of the mask of each of an answer's phrases with each target's, at the model's mask size."""
    size = said.masks.shape[-1]
    truth = [torch.from_numpy(mask_array(decode(target.rle), size)) for target in sample.targets]
    masks = said.masks.cpu() > 0
    if sample.ignore is not None:
        valid = ~torch.from_numpy(mask_array(decode(sample.ignore), size))
        truth, masks = [true & valid for true in truth], masks & valid
    return [[float(_ious(mask, true)) for true in truth] for mask in masks]


def _ious(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU over the last two axes; 1 for two empty masks."""
    joint = (masks | truth).flatten(-2).sum(-1)
    return torch.where(joint == 0, 1.0, (masks & truth).flatten(-2).sum(-1) / joint.clamp(min=1))


def _place_in_row(rows: list[int]) -> list[int]:
    """Row of each target -> the target's number inside its row."""
    return [rows[:index].count(row) for index, row in enumerate(rows)]
