"""Images of every mode become upright RGB; what is too large or damaged is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polyzoo.core.errors import DataError
from polyzoo.core.images import open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """2 x 3 with a different colour in three corners: every turn and flip shows."""
    image = Image.new("RGB", (2, 3), WHITE)
    image.putpixel((0, 0), RED)
    image.putpixel((1, 0), GREEN)
    image.putpixel((0, 2), BLUE)
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pixels(image: Image.Image) -> list[list[int]]:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    path, data = tmp_path / "a.png", encoded(corners())
    path.write_bytes(data)
    with path.open("rb") as file:
        for source in (path, str(path), data, io.BytesIO(data), file, corners()):
            assert pixels(open_image(source)) == pixels(corners())


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_come_back_exactly(form: str) -> None:
    assert pixels(open_image(encoded(corners(), form))) == pixels(corners())


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_nearly(form: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    got = np.asarray(open_image(encoded(image, form)), np.int64)
    assert abs(got - np.asarray(image, np.int64)).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_undone(orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = corners().transpose(undo[orientation]) if orientation in undo else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(open_image(encoded(stored, exif=exif))) == pixels(corners())


def test_damaged_exif_leaves_the_image_usable() -> None:
    data = encoded(corners(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert pixels(open_image(data)) == pixels(corners())


def test_transparency_is_laid_over_the_background() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    assert pixels(open_image(encoded(image))) == [[[255, 0, 0], [255, 255, 255]]]
    assert pixels(open_image(encoded(image), background=GREEN)) == [[[255, 0, 0], [0, 255, 0]]]
    assert pixels(open_image(image)) == [[[255, 0, 0], [255, 255, 255]]]


def test_half_transparency_is_mixed() -> None:
    got = pixels(open_image(encoded(Image.new("LA", (1, 1), (0, 128)))))[0][0]
    assert got == [127, 127, 127]


def test_palettes_with_and_without_transparency() -> None:
    palette = corners().quantize(4)
    assert pixels(open_image(encoded(palette))) == pixels(corners())
    index = palette.getpixel((0, 0))
    clear = pixels(open_image(encoded(palette, transparency=index)))
    assert clear[0][0] == [255, 255, 255]
    assert clear[1:] == pixels(corners())[1:]


@pytest.mark.parametrize(("mode", "value", "grey"), [("1", 1, 255), ("L", 7, 7)])
def test_grey_images(mode: str, value: int, grey: int) -> None:
    assert pixels(open_image(encoded(Image.new(mode, (1, 1), value)))) == [[[grey] * 3]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str) -> None:
    deep = Image.fromarray(np.array([[0, 128, 257, 32896, 65535]], np.uint16))
    assert [p[0] for p in pixels(open_image(encoded(deep, form)))[0]] == [0, 0, 1, 128, 255]


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point pixels of no agreed range"):
        open_image(encoded(Image.new("F", (1, 1), 0.5), "TIFF"))
    with pytest.raises(DataError, match="grey values 0 to 70000 are not 16 bit"):
        open_image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_cmyk_is_converted() -> None:
    assert pixels(open_image(encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "TIFF"))) == [
        [[255, 255, 255]]
    ]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(open_image(data)) == pixels(frames[0])


def test_pixels_are_counted_before_decoding() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    for side, message in ((9000, "9000 x 9000 is more than 64,000,000"), (60_000, "64,000,000")):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        # There are no pixels in the file: whoever decodes it first fails otherwise.
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
        with pytest.raises(DataError, match=message):
            open_image(bomb)
    with pytest.raises(DataError, match="2 x 3 is more than 5 pixels; scale it down, or raise max"):
        open_image(corners(), max_pixels=5)
    assert open_image(corners(), max_pixels=6).size == (2, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(form: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), form)
    with pytest.raises(DataError, match=r"^image: is (damaged|not one of)"):
        open_image(data[: len(data) // 2])


@settings(max_examples=60)
@given(data=st.data(), form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
def test_damaged_files_raise_only_our_error(data: st.DataObject, form: str) -> None:
    raw = bytearray(encoded(corners().resize((20, 20)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(raw), max_pixels=10**6).mode == "RGB"
    except DataError as error:
        assert str(error).startswith("image: ")


def test_what_is_no_image_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a\.png: is not one of PNG, JPEG"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is a folder; give an image file"):
        open_image(tmp_path)
    with pytest.raises(DataError, match="addresses are not fetched; download the file"):
        open_image("https://example.org/a.png")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    with pytest.raises(DataError, match="is not one of"):
        open_image(tmp_path / "a.eps")


def test_the_given_image_is_left_as_it_was() -> None:
    image = corners()
    got = open_image(image)
    got.putpixel((0, 0), GREEN)
    assert image.getpixel((0, 0)) == RED
