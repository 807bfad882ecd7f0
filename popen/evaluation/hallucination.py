"""CHAIR: objects an answer mentions that are not in the image, and targets that it never mentions.

After Rohrbach et al. 2018: words become categories through a synonym table (`popen.model.words`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from popen.model.words import Vocabulary
from popen.samples import Sample


@dataclass(frozen=True)
class Judgement:
    """What an answer says about the things in its image."""

    mentioned: frozenset[str]  # categories; empty where the sample lists no objects
    hallucinated: frozenset[str]  # those of them that are not in the image
    missing: tuple[str, ...]  # categories of true targets never mentioned, one entry a target
    targets: int  # true targets with a category


def categories(samples: Iterable[Sample]) -> set[str]:
    """All categories annotated in the samples."""
    return {region.category for sample in samples for region in (*sample.objects, *sample.targets)} - {""}


def judge(sample: Sample, text: str, vocabulary: Vocabulary) -> Judgement:
    """Compare an answer with what is in the image. Without annotated objects nothing counts as mentioned."""
    said = vocabulary.mentioned(text)
    wanted = [vocabulary.category(target.category) for target in sample.targets if target.category]
    present = {vocabulary.category(region.category) for region in sample.objects if region.category}
    present |= set(wanted)
    judged = said if sample.objects else set()
    return Judgement(
        mentioned=frozenset(judged),
        hallucinated=frozenset(judged - present),
        missing=tuple(category for category in wanted if category not in said),
        targets=len(wanted),
    )
