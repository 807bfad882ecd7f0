"""Caption metrics of GranD_f: CIDEr, and METEOR where Java is there.

Words are lower-cased runs of letters and digits (ours: COCO's tokenizer needs Java), so figures differ
in the last digits from those of papers that use it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

from popen.samples import SEG


def tokenize(text: str) -> str:
    """Lower-case words joined by single blanks, `{seg}` and punctuation dropped."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.replace(SEG, " ").lower()))


def cider(answers: Sequence[str], references: Sequence[str]) -> float:
    """CIDEr-D over a set (Vedantam et al. 2015), one reference each; 0..10. NaN for an empty set."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not answers:
        return float("nan")
    scorer = CiderScorer()
    for answer, reference in zip(answers, references, strict=True):
        scorer += (tokenize(answer), [tokenize(reference)])
    score, _ = scorer.compute_score()
    return float(score)


def meteor(answers: Sequence[str], references: Sequence[str]) -> float:
    """METEOR 1.5 over a set, 0..1. NaN for an empty set and where no `java` is on the PATH."""
    from pycocoevalcap.meteor.meteor import Meteor

    if not answers or shutil.which("java") is None:
        return float("nan")
    pairs = list(enumerate(zip(answers, references, strict=True)))
    # An empty answer would shift the fields of METEOR's line protocol: a lone dot scores 0 just as well.
    given = {number: [tokenize(answer) or "."] for number, (answer, _) in pairs}
    wanted = {number: [tokenize(reference) or "."] for number, (_, reference) in pairs}
    score, _ = Meteor().compute_score(wanted, given)
    return float(score)
