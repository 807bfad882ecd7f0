from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from popen.data.images import ImageError, decode_image, digest, image_size, open_image
from tests.data.trees import write_image

LIMIT = 10_000


def giant_png(path: Path, side: int) -> None:
    """A valid header that promises side x side pixels, and next to no data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


def test_an_image_is_opened_as_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 5, 4), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    image = open_image(tmp_path, "a.png", LIMIT)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert image_size(tmp_path, "a.png") == (3, 5)


@pytest.mark.parametrize("side", [101, 12_000, 60_000])
def test_a_giant_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    giant_png(tmp_path / "a.png", side)
    with pytest.raises(ImageError, match=r"a\.png: .*(more than the 10000 allowed|far too large)"):
        open_image(tmp_path, "a.png", LIMIT)


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0, (100, 100))
    assert open_image(tmp_path, "a.png", LIMIT).size == (100, 100)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / name, 0, (90, 90))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert image_size(tmp_path, name) == (90, 90)  # the header is sound, the pixels are not
    with pytest.raises(ImageError, match=r"not a readable image .*fetch"):
        open_image(tmp_path, name, LIMIT)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "uint16"), ("a.tif", "uint16"), ("a.tif", "int32"), ("a.tif", "float32")]
)
def test_greyscale_of_more_than_8_bits_is_refused_not_cut_off(tmp_path: Path, name: str, kind: str) -> None:
    Image.fromarray(np.linspace(0, 1000, 12).reshape(3, 4).astype(kind)).save(tmp_path / name)
    for look in (
        lambda: image_size(tmp_path, name),
        lambda: open_image(tmp_path, name, LIMIT),
        lambda: decode_image((tmp_path / name).read_bytes(), name, LIMIT),
    ):
        with pytest.raises(ImageError, match=rf"{name}: more than 8 bits .*convert it to 8 bits"):
            look()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_kinds_of_pixels_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    assert open_image(tmp_path, "a.png", LIMIT).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM"])
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: not a readable image"):
        open_image(tmp_path, "a.png", LIMIT)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_is_turned_as_viewers_and_opencv_turn_it(
    tmp_path: Path, orientation: int, name: str
) -> None:
    image, exif = Image.new("RGB", (16, 8)), Image.Exif()
    image.paste("white", (0, 0, 8, 4))  # the upper left quarter
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
    opened = open_image(tmp_path, name, 1000)
    assert np.array_equal(np.asarray(opened), np.asarray(expected))
    assert image_size(tmp_path, name) == (opened.height, opened.width)
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    below, right = corner.get(orientation, (0, 0))
    assert opened.size == ((8, 16) if 5 <= orientation <= 8 else (16, 8))
    row, column = (
        opened.height // 4 + below * opened.height // 2,
        opened.width // 4 + right * opened.width // 2,
    )
    assert np.asarray(opened)[row, column].min() > 200


def test_damaged_exif_data_is_no_damage_to_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0nothing of the kind")
    assert open_image(tmp_path, "a.jpg", 1000).size == (16, 8)
    assert image_size(tmp_path, "a.jpg") == (8, 16)


def test_a_png_with_too_much_text_is_named(tmp_path: Path) -> None:
    """Pillow refuses a compressed text of more than a megabyte with an error of its own kind."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    for look in (lambda: image_size(tmp_path, "a.png"), lambda: open_image(tmp_path, "a.png", 1000)):
        with pytest.raises(ImageError, match=r"^a\.png: not a readable image"):
            look()


def test_files_that_are_missing_or_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, why in (("none.png", "no such file"), ("folder", "is a folder")):
        with pytest.raises(ImageError, match=f"{name}: {why}"):
            open_image(tmp_path, name, LIMIT)


@pytest.mark.parametrize("name", ["a\0.png", "\ud83d.png", "long" * 75 + ".png", "circle.png"])
def test_paths_that_the_system_refuses(tmp_path: Path, name: str) -> None:
    os.symlink("circle.png", tmp_path / "circle.png")
    for look in (image_size, open_image):
        with pytest.raises(ImageError, match=r"no usable path .*rename the file") as caught:
            look(tmp_path, name, LIMIT)
        str(caught.value).encode()  # can be printed and stored


def test_paths_that_climb_out_of_the_root(tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png", 0)
    root = tmp_path / "data"
    root.mkdir()
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "folder")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png"):
        with pytest.raises(ImageError, match="outside of the data root"):
            open_image(root, name, LIMIT)


def test_links_inside_the_root_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png", 0)
    os.symlink("a.png", tmp_path / "data/b.png")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere")
    assert open_image(tmp_path / "elsewhere", "b.png", LIMIT).size == (16, 12)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
