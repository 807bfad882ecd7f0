"""The page of examples: questions chosen by rule, and one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pandas import DataFrame
from PIL import Image

from popen.evaluation.overlay import colour, paint, pieces
from popen.masks import Mask


@dataclass(frozen=True)
class Panel:
    """One answer to the question: whose, its masks (H, W of the image), its text, and a line of figures."""

    name: str
    masks: tuple[Mask, ...]
    answer: str
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A question about an image with the truth and the answers of some systems."""

    uid: str
    question: str
    image: Image.Image
    panels: tuple[Panel, ...]


def choose(before: DataFrame, after: DataFrame, each: int) -> dict[str, list[str]]:
    """Heading -> uids of up to `each` questions, good and bad; no question twice.

    `before` and `after` are the rows of two systems on the same questions. The choice is a rule, not a
    taste: the extremes of a column, equal values in the order of the uids.
    """
    joined = after.set_index("uid").sort_index()
    gain = joined["matched"] - before.set_index("uid")["matched"]
    several = joined["n_true"] > 1
    rules = {
        "Best: several targets": joined["matched"].where(several),
        "Gained most": gain.where(gain > 0),
        "Lost most": (-gain).where(gain < 0),
        "Hallucinated": joined["hallucinated"].where(joined["hallucinated"] > 0),
        "Missed targets": joined["missing"].where(joined["missing"] > 0),
        "Worst overlap": (1 - joined["matched"]).where(joined["hallucinated"] + joined["missing"] == 0),
    }
    taken: set[str] = set()
    chosen = {}
    for heading, value in rules.items():
        ranked = value.dropna().sort_values(ascending=False, kind="stable").index
        chosen[heading] = [uid for uid in ranked if uid not in taken][:each]
        taken |= set(chosen[heading])
    return {heading: uids for heading, uids in chosen.items() if uids}


def showpieces(rows: DataFrame, images: Mapping[str, str], count: int) -> list[str]:
    """uids of flawless answers to several targets, best overlap first, each of another image (`images`:
    uid -> image) and, as far as they reach, of another kind of question."""
    flawless = rows[(rows["hallucinated"] == 0) & (rows["missing"] == 0) & (rows["n_true"] > 0)]
    several = flawless[flawless["n_true"] > 1]
    ranked = (several if len(several) >= count else flawless).sort_values(
        ["matched", "uid"], ascending=[False, True]
    )
    of_each_kind = ranked.drop_duplicates("kind")
    order = dict.fromkeys([*of_each_kind["uid"], *ranked["uid"]])
    by_image: dict[str, str] = {}
    for uid in order:
        by_image.setdefault(images[uid], uid)
    return list(by_image.values())[:count]


def _picture(image: Image.Image, masks: Sequence[Mask]) -> str:
    buffer = io.BytesIO()
    paint(image, masks, 288).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _answer(text: str) -> str:
    """An answer as HTML, each phrase in the colour of its mask."""
    return "".join(
        escape(words) if index is None else f'<b style="color:rgb{colour(index)}">{escape(words)}</b>'
        for words, index in pieces(text)
    )


def _panel(image: Image.Image, panel: Panel) -> str:
    return (
        f"<figure><figcaption>{escape(panel.name)}<span>{escape(panel.note)}</span></figcaption>"
        f'<img alt="{escape(panel.name)}" src="data:image/jpeg;base64,{_picture(image, panel.masks)}">'
        f"<p>{_answer(panel.answer)}</p></figure>"
    )


def _example(example: Example) -> str:
    panels = "\n".join(_panel(example.image, panel) for panel in example.panels)
    return (
        f"<article><h3>{escape(example.question)}</h3><code>{escape(example.uid)}</code>\n"
        f'<div class="row">{panels}</div></article>'
    )


_CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #20242c; background: #f4f5f7; margin: 0 auto;
  max-width: 1280px; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 36px 0 12px; } h3 { margin: 0; font-size: 16px; }
article { background: #fff; border-radius: 10px; padding: 16px 20px; margin: 14px 0;
  box-shadow: 0 1px 3px rgb(0 0 0 / 12%); }
code { color: #6e7682; font-size: 12px; }
.row { display: flex; flex-wrap: wrap; gap: 18px; margin-top: 10px; }
figure { margin: 0; width: 288px; } img { border-radius: 6px; max-width: 100%; display: block; }
figcaption { font-weight: 600; display: flex; justify-content: space-between; padding-bottom: 4px; }
figcaption span { font-weight: 400; color: #6e7682; font-size: 13px; }
p { margin: 8px 0 0; }
"""


def page(title: str, lead: str, sections: Mapping[str, Sequence[Example]]) -> str:
    """The HTML file. Every text is escaped, every image embedded: nothing is fetched when it is opened."""
    body = "\n".join(
        f"<h2>{escape(heading)}</h2>\n" + "\n".join(map(_example, examples))
        for heading, examples in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><p>{escape(lead)}</p>\n{body}\n</body></html>\n"
    )
