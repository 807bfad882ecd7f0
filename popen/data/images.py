"""Opening image files that nobody vouches for."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

MAX_PIXELS = 40_000_000  # where no parameter says otherwise
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


class ImageError(ValueError):
    """An image file cannot be used; the message names it, what is wrong and the remedy."""


class AbsentImageError(ImageError):
    """There is no such file."""


def locate(root: Path, relative: str) -> Path:
    """The file `relative` below `root`. Raises ImageError when it lies outside, also through a link."""
    base = root.resolve()
    try:
        path = (base / relative).resolve()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null byte, links in a circle
        why = getattr(error, "strerror", None) or error
        raise ImageError(f"{relative!r}: no usable path ({why}); rename the file or correct it") from None
    if not path.is_relative_to(base):
        raise ImageError(f"{relative}: lies outside of the data root {root}; copy or hard-link it into it")
    if not is_file:
        what = "is a folder, not an image" if is_folder else f"no such file below {root}"
        raise AbsentImageError(f"{relative}: {what}; fetch the images or correct the path")
    return path


@contextmanager
def _header(source: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """Pillow's lazy image: the header is read, no pixel is decoded. `name` is for the messages.

    Raises ImageError, also on greyscale of 16 or 32 bits: Pillow cuts its values off at 255 on the way to
    RGB, which leaves a white image (a black one of floats from 0 to 1).
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ImageError(
                    f"{name}: more than 8 bits a channel (mode {image.mode}); convert it to 8 bits a channel"
                )
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: far too large to decode ({error}); scale it down") from None
    except (OSError, SyntaxError, EOFError, ValueError, struct.error) as error:
        # Pillow's plugins raise all of these on damaged files.
        raise ImageError(f"{name}: not a readable image ({error}); fetch or convert it again") from None


def image_size(root: Path, relative: str, max_pixels: int | None = None) -> tuple[int, int]:
    """(height, width) from the header alone. Raises ImageError on what it tells: no image, more than 8 bits
    a channel, more than `max_pixels` pixels."""
    with _header(locate(root, relative), relative) as image:
        if max_pixels is not None:
            _refuse_larger(image, relative, max_pixels)
        turned = 5 <= _orientation(image) <= 8
        return (image.width, image.height) if turned else (image.height, image.width)


def open_image(root: Path, relative: str, max_pixels: int) -> Image.Image:
    """RGB image, turned as its EXIF data says: so viewers, annotators' tools and OpenCV, with which the peers
    read theirs, show it.

    Raises ImageError on a path that leaves `root`, a file that is missing, damaged or truncated, and on more
    than 8 bits a channel or `max_pixels` pixels, which the header tells before anything is decoded.
    """
    return _decoded(locate(root, relative), relative, max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """`open_image` for the bytes of a file that has no path; `name` stands for it in the messages."""
    return _decoded(io.BytesIO(data), name, max_pixels)


def _decoded(source: Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    with _header(source, name) as image:
        _refuse_larger(image, name, max_pixels)
        turn = TURNS.get(_orientation(image))
        pixels = image.convert("RGB")
        return pixels if turn is None else pixels.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation as the header tells it: 1 is as stored, from 5 to 8 the sides change places."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, EOFError, ValueError, TypeError, struct.error):
        return 1  # damaged EXIF data is no damage to the image


def _refuse_larger(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels are more than the {max_pixels} allowed; "
            "scale it down or raise data.max_pixels"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
