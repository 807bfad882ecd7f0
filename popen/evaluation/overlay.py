"""Pictures of an answer: masks over the image, and below it the words in the colours of their masks."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

from popen.masks import Mask
from popen.samples import SEG

Colour = tuple[int, int, int]
INK, FAINT, PAPER = (32, 36, 44), (110, 118, 130), (255, 255, 255)
_SCALE = 2  # everything is drawn at twice the size and reduced: smooth outlines and letters
_PALETTE: tuple[Colour, ...] = (
    (230, 57, 70), (29, 122, 214), (20, 150, 90), (240, 140, 20), (140, 70, 200),
    (0, 160, 175), (214, 60, 150), (150, 110, 40), (90, 140, 20), (80, 90, 220),
)  # fmt: skip
# A phrase of an answer starts after one of these, or at its first article.
_BEFORE_PHRASE = re.compile(r"(?:[,;:.!?]|\b(?:and|or|is|are|see|be)\b)(?=[^,;:.!?]*$)", re.IGNORECASE)
_ARTICLE = re.compile(r"\b(?:the|an|a|its|his|her|their|one|two|three)\s", re.IGNORECASE)


def colour(index: int) -> Colour:
    """Colour of the index-th target; the palette first, then hues around the circle."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    red, green, blue = colorsys.hls_to_rgb(index * 0.618 % 1.0, 0.42, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def pieces(answer: str) -> list[tuple[str, int | None]]:
    """Split an answer into (words, number of the target they name or None), in order, `{seg}` removed.

    >>> pieces("Here, the cup {seg} and a fork {seg}.")
    [('Here, ', None), ('the cup', 0), (' and ', None), ('a fork', 1), ('.', None)]
    """
    parts = answer.split(SEG)
    out: list[tuple[str, int | None]] = []
    for index, part in enumerate(parts[:-1]):
        stop = list(_BEFORE_PHRASE.finditer(part))
        start = stop[-1].end() if stop else 0
        article = _ARTICLE.search(part, start)
        start = article.start() if article else start
        phrase = part[start:].strip()
        start = part.index(phrase, start) if phrase else start
        out += [(part[:start], None), (phrase, index)]
    out.append((parts[-1], None))
    return [(words, index) for words, index in out if words]


@lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _smooth(mask: Mask, size: tuple[int, int]) -> Mask:
    """Mask resized to (width, height) with rounded instead of stepped borders."""
    grey = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return gaussian_filter(np.asarray(grey), 0.4 * size[0] / mask.shape[1]) >= 0.5


def paint(image: Image.Image, masks: Sequence[Mask], size: int = 320) -> Image.Image:
    """Translucent masks (H, W of the image) with outlines; the long side becomes `size` pixels."""
    factor = size / max(image.size)
    final = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    large = final[0] * _SCALE, final[1] * _SCALE
    canvas: NDArray[np.float32] = np.asarray(
        image.convert("RGB").resize(large, Image.Resampling.BICUBIC), dtype=np.float32
    ).copy()
    shapes = [_smooth(mask, large) for mask in masks]
    if shapes:
        outside = ~np.any(shapes, axis=0)
        grey = canvas.mean(axis=2, keepdims=True)
        canvas[outside] = (0.7 * canvas + 0.2 * grey + 0.1 * 255)[outside]  # the rest steps back a little
    width = max(2, round(size / 80)) * _SCALE // 2
    for index, shape in enumerate(shapes):
        canvas[shape] = 0.72 * canvas[shape] + 0.28 * np.array(colour(index), dtype=np.float32)
    for index, shape in enumerate(shapes):
        halo = binary_dilation(shape, iterations=_SCALE) & ~shape
        canvas[halo] = 0.15 * canvas[halo] + 0.85 * 255
        canvas[shape & ~binary_erosion(shape, iterations=width, border_value=0)] = colour(index)
    painted = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
    return painted.resize(final, Image.Resampling.LANCZOS)


Run = tuple[str, Colour, bool]  # words, colour, bold


def _lines(runs: Sequence[Run], size: int, width: int) -> list[list[Run]]:
    """Break runs into lines no wider than `width`; a word that is itself too long is cut."""
    lines: list[list[Run]] = [[]]
    used = 0.0
    for words, ink, bold in runs:
        face = font(size, bold)
        for token in re.findall(r"\s+|[^\s]+", words):
            while token:
                length = face.getlength(token)
                if used + length <= width or (used > 0 and re.fullmatch(r"[,;:.!?]+", token)):
                    lines[-1].append((token, ink, bold))
                    used += length
                    break
                if used > 0:
                    lines.append([])
                    used = 0.0
                    token = token.lstrip()
                    continue
                fitting = max(1, int(len(token) * width / length))
                lines[-1].append((token[:fitting], ink, bold))
                token, used = token[fitting:], float(width)
    return [line for line in lines if line]


def caption(runs: Sequence[Run], width: int, size: int = 13) -> Image.Image:
    """Text of coloured runs as a picture `width` pixels wide, as high as it needs."""
    big, pad = size * _SCALE, size * _SCALE // 2
    lines = _lines(runs, big, width * _SCALE - 2 * pad)
    step = round(big * 1.4)
    picture = Image.new("RGB", (width * _SCALE, step * len(lines) + 2 * pad), PAPER)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        x = float(pad)
        for words, ink, bold in line:
            draw.text((x, pad + row * step), words, fill=ink, font=font(big, bold))
            x += font(big, bold).getlength(words)
    return picture.resize((width, picture.height // _SCALE), Image.Resampling.LANCZOS)


def answer_runs(answer: str) -> list[Run]:
    """An answer's words, each phrase in the colour of its mask."""
    return [
        (words, INK, False) if index is None else (words, colour(index), True)
        for words, index in pieces(answer)
    ]


def stack(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures below one another on white."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        out.paste(picture, (0, y))
        y += picture.height + gap
    return out


def beside(pictures: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Pictures side by side on white, with a margin of `gap` around."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) + 1)
    out = Image.new("RGB", (width, max(picture.height for picture in pictures) + 2 * gap), PAPER)
    x = gap
    for picture in pictures:
        out.paste(picture, (x, gap))
        x += picture.width + gap
    return out


def overlay(
    image: Image.Image, masks: Sequence[Mask], answer: str, question: str = "", size: int = 320
) -> Image.Image:
    """The picture of one answer: question (if given), masks over the image, the answer in their colours.

    `masks` are (H, W) of `image`, one a `{seg}` of `answer`; the long side of the image becomes `size`.
    Raises ValueError when a mask has another size or the counts differ.
    """
    if answer.count(SEG) != len(masks):
        raise ValueError(f"the answer names {answer.count(SEG)} targets but there are {len(masks)} masks")
    for mask in masks:
        if mask.shape != (image.height, image.width):
            raise ValueError(f"a mask of {mask.shape} over an image of {(image.height, image.width)}")
    painted = paint(image, masks, size)
    width, letters = painted.width, max(11, size // 24)
    parts = [caption([(question, INK, True)], width, letters)] if question.strip() else []
    parts.append(painted)
    if answer.strip():
        parts.append(caption(answer_runs(answer), width, letters))
    return stack(parts)
