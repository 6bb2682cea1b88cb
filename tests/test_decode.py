"""Bytes to pixels: what viewers show, and the right error for what nobody can."""

import io
import struct
import threading
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from pipeline.decode import decode, decode_picture
from schemas.errors import (
    DecodeError,
    ImageCorrupt,
    ImageEmpty,
    ImageTooLarge,
    ImageUnidentified,
)
from tests.shards import RED, image_bytes, saved

LIMIT = 10_000
WHITE = (255, 255, 255)


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> Any:
    image = decode(data, max_pixels=LIMIT)
    assert image.mode == "RGB"
    return image.getpixel(at)


def gradient(size: tuple[int, int] = (40, 30)) -> Image.Image:
    width, height = size
    rows = np.add.outer(np.arange(height) * 3, np.arange(width) * 2) % 256
    return Image.fromarray(np.stack([rows, rows[::-1], 255 - rows], axis=-1).astype(np.uint8))


def photo(kind: str) -> bytes:
    return saved(gradient(), kind)


def of_array(values: Any, dtype: Any) -> bytes:
    return saved(Image.fromarray(np.array(values, dtype=dtype)), "TIFF")


def grey_levels(data: bytes) -> list[int]:
    image = np.asarray(decode(data, max_pixels=LIMIT))
    assert (image[..., 0] == image[..., 1]).all()
    return [int(value) for value in image[..., 0].ravel()]


class TestPixels:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
    def test_lossless_formats_give_their_pixels(self, kind: str) -> None:
        assert pixel(image_bytes(kind)) == RED

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000"])
    def test_lossy_formats_give_nearly_their_pixels(self, kind: str) -> None:
        assert np.abs(np.subtract(pixel(image_bytes(kind)), RED)).max() <= 3

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_exif_orientation_is_applied_once(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(gradient(), "PNG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        image = decode(data, max_pixels=LIMIT)
        assert image.tobytes() == upright.tobytes()
        assert ImageOps.exif_transpose(image).tobytes() == image.tobytes()

    def test_exif_that_cannot_be_read_leaves_the_image_as_it_is(self) -> None:
        data = saved(gradient(), "PNG", exif=b"Exif\0\0MM\0*garbage")
        assert decode(data, max_pixels=LIMIT).tobytes() == gradient().tobytes()

    @pytest.mark.parametrize(
        ("mode", "color", "expected"),
        [
            ("RGBA", (255, 0, 0, 255), RED),
            ("RGBA", (255, 0, 0, 0), WHITE),
            ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
            ("LA", (0, 0), WHITE),
            ("LA", (7, 255), (7, 7, 7)),
        ],
    )
    def test_transparency_is_laid_on_white(self, mode: str, color: Any, expected: Any) -> None:
        assert pixel(image_bytes(mode=mode, color=color)) == expected

    def test_a_transparent_palette_colour_is_white(self) -> None:
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((1, 0), 1)
        for kind in ("PNG", "GIF"):
            data = saved(image, kind, transparency=0)
            assert (pixel(data), pixel(data, (1, 0))) == (WHITE, RED)

    def test_a_transparent_colour_key_is_white(self) -> None:
        image = Image.new("RGB", (2, 1), (1, 2, 3))
        image.putpixel((1, 0), RED)
        data = saved(image, "PNG", transparency=(1, 2, 3))
        assert (pixel(data), pixel(data, (1, 0))) == (WHITE, RED)

    @pytest.mark.parametrize(
        ("kind", "mode", "color", "expected"),
        [
            ("JPEG", "CMYK", (0, 255, 255, 0), RED),
            ("TIFF", "YCbCr", (76, 85, 255), RED),
            ("TIFF", "LAB", (255, 128, 128), WHITE),
            ("PNG", "1", 1, WHITE),
            ("PNG", "L", 9, (9, 9, 9)),
        ],
    )
    def test_other_colour_modes_become_rgb(
        self, kind: str, mode: str, color: Any, expected: Any
    ) -> None:
        difference = np.subtract(pixel(image_bytes(kind, mode=mode, color=color)), expected)
        assert np.abs(difference).max() <= 3

    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    def test_16_bits_are_scaled_from_their_full_range(self, dtype: str) -> None:
        assert grey_levels(of_array([[0, 257, 32896, 65535]], dtype)) == [0, 1, 128, 255]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([[0, 128, 255]], [0, 128, 255]),
            ([[0, 257, 65535]], [0, 1, 255]),
            ([[-10, 0, 10]], [0, 128, 255]),
            ([[-7, -7, -7]], [0, 0, 0]),
        ],
    )
    def test_32_bit_integers_are_scaled_from_the_range_that_holds_them(
        self, values: Any, expected: list[int]
    ) -> None:
        assert grey_levels(of_array(values, np.int32)) == expected

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([[0.0, 0.5, 1.0]], [0, 128, 255]),
            ([[0.0, 100.2, 255.0]], [0, 100, 255]),
            ([[-1.0, 0.0, 1.0]], [0, 128, 255]),
            ([[np.nan, 0.0, 1.0]], [0, 0, 255]),
            ([[np.nan, np.inf, -np.inf]], [0, 0, 0]),
            ([[-3.4e38, 0.0, 3.4e38]], [0, 128, 255]),
        ],
    )
    def test_floats_are_scaled_from_the_range_that_holds_them(
        self, values: Any, expected: list[int]
    ) -> None:
        assert grey_levels(of_array(values, np.float32)) == expected

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_of_an_animation_the_first_frame_is_taken(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 255, 0))]
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.subtract(pixel(data), RED)).max() <= 3

    def test_nothing_of_the_file_stays_with_the_image(self) -> None:
        image = decode(saved(gradient(), "PNG", dpi=(72, 72)), max_pixels=LIMIT)
        assert type(image) is Image.Image
        assert image.info == {}


class TestErrors:
    def test_zero_bytes_are_an_empty_image(self) -> None:
        with pytest.raises(ImageEmpty, match="zero bytes"):
            decode(b"", max_pixels=LIMIT)

    @pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>", b"x", b"\x93NUMPY\x01\x00v\x00{'"])
    def test_what_is_no_image_is_unidentified(self, data: bytes) -> None:
        with pytest.raises(ImageUnidentified, match="no image format starts with the bytes"):
            decode(data, max_pixels=LIMIT)

    def test_eps_is_not_handed_to_ghostscript(self) -> None:
        with pytest.raises(ImageUnidentified):
            decode(image_bytes("EPS"), max_pixels=LIMIT)

    def test_too_many_pixels_are_refused_by_the_header_alone(self) -> None:
        data = saved(Image.new("L", (200, 100)), "PNG")
        header_only = data[:33] + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0)
        with pytest.raises(ImageTooLarge) as error:
            decode(header_only, max_pixels=19_999)
        message = str(error.value)
        assert "200 x 100 = 20000 pixels" in message
        assert "19999 of source.max_image_pixels" in message
        assert decode(data, max_pixels=20_000).size == (200, 100)

    @pytest.mark.parametrize("side", [101, 2000])
    def test_an_image_hidden_in_an_icon_obeys_the_limit(self, side: int) -> None:
        big = saved(Image.new("L", (side, side)), "PNG")
        entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(big), 22)
        with pytest.raises(ImageTooLarge, match=r"source\.max_image_pixels"):
            decode(struct.pack("<HHH", 0, 1, 1) + entry + big, max_pixels=LIMIT)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF"])
    def test_a_file_cut_in_half_is_corrupt(self, kind: str) -> None:
        data = photo(kind)
        with pytest.raises(ImageCorrupt):
            decode(data[: len(data) // 2], max_pixels=LIMIT)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
    def test_the_start_of_a_header_is_corrupt_not_unidentified(self, kind: str) -> None:
        with pytest.raises(ImageCorrupt):
            decode(photo(kind)[:17], max_pixels=LIMIT)

    def test_a_broken_header_names_the_format_that_it_looks_like(self) -> None:
        with pytest.raises(ImageCorrupt, match="starts like PNG but its header is broken"):
            decode(photo("PNG").replace(b"IHDR", b"\1HDR"), max_pixels=LIMIT)

    def test_a_broken_checksum_is_corrupt(self) -> None:
        data = bytearray(photo("PNG"))
        data[data.index(b"IDAT") + 20] ^= 0xFF
        with pytest.raises(ImageCorrupt, match="the image cannot be decoded: "):
            decode(bytes(data), max_pixels=LIMIT)

    def test_an_image_without_pixels_is_corrupt(self) -> None:
        with pytest.raises(ImageCorrupt):
            decode(b"P6 0 5 255\n", max_pixels=LIMIT)
        header = struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
        with pytest.raises(ImageCorrupt):
            decode(png + struct.pack(">I", zlib.crc32(chunk)), max_pixels=LIMIT)


class TestTruncatedOnesThatAreAllowed:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_what_is_there_is_decoded(self, kind: str) -> None:
        data = saved(gradient((400, 300)), kind)
        image = decode(data[: len(data) * 3 // 4], max_pixels=200_000, allow_truncated=True)
        whole = decode(data, max_pixels=200_000)
        top = (0, 0, 400, 100)
        assert image.size == (400, 300)
        assert image.crop(top).tobytes() == whole.crop(top).tobytes()
        assert image.tobytes() != whole.tobytes()

    @pytest.mark.parametrize("data", [b"", photo("PNG")[:17], b"no image"])
    def test_what_has_no_pixels_fails_all_the_same(self, data: bytes) -> None:
        with pytest.raises(DecodeError):
            decode(data, max_pixels=LIMIT, allow_truncated=True)


def twice(size: tuple[int, int]) -> tuple[int, int]:
    """Enough for an image that becomes a twentieth as large."""
    return size[0] // 10, size[1] // 10


class TestReduced:
    @pytest.mark.parametrize(
        ("enough", "size"),
        [
            ((80, 60), (100, 75)),
            ((100, 75), (100, 75)),
            ((101, 75), (200, 150)),
            ((401, 300), (800, 600)),
            ((10, 600), (800, 600)),
            ((1000, 10), (800, 600)),
        ],
    )
    def test_a_jpeg_becomes_an_eighth_a_quarter_or_a_half_but_never_less_than_enough(
        self, enough: tuple[int, int], size: tuple[int, int]
    ) -> None:
        data = saved(gradient((800, 600)), "JPEG")
        picture = decode_picture(data, max_pixels=480_000, enough=lambda _: enough)
        assert (picture.image.size, picture.size) == (size, (800, 600))

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_what_is_enough_is_said_of_the_upright_image(self, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(gradient((800, 600)), "JPEG", exif=exif)
        whole = decode_picture(data, max_pixels=480_000)
        asked: list[tuple[int, int]] = []

        def enough(size: tuple[int, int]) -> tuple[int, int]:
            asked.append(size)
            return twice(size)

        reduced = decode_picture(data, max_pixels=480_000, enough=enough)
        assert asked == [whole.size]
        assert reduced.size == whole.size == whole.image.size
        assert reduced.image.size == tuple(side // 8 for side in whole.size)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG2000"])
    def test_other_formats_are_decoded_whole(self, kind: str) -> None:
        data = saved(gradient((800, 600)), kind)
        picture = decode_picture(data, max_pixels=480_000, enough=twice)
        assert picture.image.tobytes() == decode(data, max_pixels=480_000).tobytes()
        assert picture.size == (800, 600)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
    def test_every_mode_of_jpeg_can_be_reduced(self, mode: str) -> None:
        image = gradient((80, 60)).resize((800, 600), Image.Resampling.BICUBIC)
        data = saved(image.convert(mode), "JPEG", quality=95)
        picture = decode_picture(data, max_pixels=480_000, enough=twice)
        whole = decode(data, max_pixels=480_000).resize((100, 75), Image.Resampling.BOX)
        difference = np.asarray(picture.image).astype(int) - np.asarray(whole)
        assert np.abs(difference).mean() < 2

    def test_the_limit_is_of_the_whole_image(self) -> None:
        data = saved(gradient((800, 600)), "JPEG")
        with pytest.raises(ImageTooLarge):
            decode_picture(data, max_pixels=479_999, enough=twice)


class TestSettingsOfTheProcess:
    def test_pillows_own_limit_neither_stops_nor_warns(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert decode(photo("PNG"), max_pixels=LIMIT).size == (40, 30)
        assert Image.MAX_IMAGE_PIXELS == 10

    def test_lenient_reading_of_truncated_files_is_off(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        data = photo("JPEG")
        with pytest.raises(ImageCorrupt, match=r"(?i)truncated"):
            decode(data[: len(data) - 200], max_pixels=LIMIT)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True

    def test_no_warning_escapes_and_the_filters_stay(self) -> None:
        image = Image.new("P", (4, 4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = list(warnings.filters)
            decode(saved(image, "PNG", transparency=bytes(range(9))), max_pixels=LIMIT)
            assert list(warnings.filters) == before
        assert caught == []

    def test_threads_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        before = list(warnings.filters)
        data = photo("PNG")
        threads = [
            threading.Thread(target=lambda: [decode(data, max_pixels=LIMIT) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Image.MAX_IMAGE_PIXELS == 10
        assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "ICO", "TGA", "JPEG2000", "DDS"]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_changed_at_random_end_in_pixels_or_a_decode_error(
    kind: str, data: st.DataObject
) -> None:
    raw = bytearray(photo(kind))
    places = st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 80) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(places)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    try:
        image = decode(bytes(raw[:cut]), max_pixels=LIMIT)
    except DecodeError as error:
        note(str(error))
    else:
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= LIMIT
