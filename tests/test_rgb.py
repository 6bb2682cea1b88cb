"""Every mode of Pillow's to RGB, against the formulas of its colour space."""

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.rgb import to_rgb

LARGE = (2100, 2001)
"""More than one strip."""


def ramp(size: tuple[int, int], *, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]: every channel another pattern over its whole range."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.int32)
    planes = [x * 5 + y * 3, x * 2 + 255 - y % 256, (x * y) // 7, x * 11 + y * 13]
    return np.stack([plane % 256 for plane in planes[:channels]], axis=-1).astype(np.uint8)


def of_mode(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    if mode == "1":
        return Image.fromarray(ramp(size, channels=1)[..., 0] > 99)
    if mode in {"I;16", "I", "F"}:
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(ramp(size, channels=1)[..., 0].astype(dtype) * 257)
    if mode in {"P", "PA"}:
        alpha = Image.fromarray(ramp(size, channels=2)[..., 1])
        colours = Image.fromarray(ramp(size, channels=1)[..., 0])
        image = Image.merge("LA", (colours, alpha)) if mode == "PA" else colours
        palette = [int(v) for n in range(256) for v in (n, 255 - n, n * 7 % 256)]
        image.putpalette(palette)
        return image
    bands = Image.getmodebands(mode)
    pixels = ramp(size, channels=bands)
    if mode == "LAB":  # near grey: what sRGB cannot show is cut off in another way by everyone
        pixels = pixels // np.uint8([2, 16, 16]) + np.uint8([64, 120, 120])
    parts = [Image.fromarray(pixels[..., band]) for band in range(bands)]
    return parts[0] if bands == 1 else Image.merge(mode, parts)


def by_formula(mode: str) -> np.ndarray:
    """Float64 [48, 64, 3]: what the small image of this mode should look like."""
    image = of_mode(mode)
    values = np.asarray(image).astype(np.float64)
    return FORMULAS[mode](values if values.ndim == 3 else values[..., None])


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colours * alpha / 255 + 255 - alpha


def palette_colours(indexes: np.ndarray) -> np.ndarray:
    return np.concatenate([indexes, 255 - indexes, indexes * 7 % 256], axis=-1)


def of_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(values, -1, 0)
    cb, cr = cb - 128, cr - 128
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)


def of_hsv(values: np.ndarray) -> np.ndarray:
    return np.array([[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in values / 255]) * 255


def of_lab(values: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D50) to sRGB; a and b are stored as signed bytes."""
    lightness = values[..., 0] * 100 / 255
    a, b = (np.where(v > 127, v - 256, v) for v in (values[..., 1], values[..., 2]))
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    xyz *= (0.9642, 1.0, 0.8249)
    matrix = np.array(
        [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1": lambda v: v.repeat(3, -1) * 255,
    "L": lambda v: v.repeat(3, -1),
    "I;16": lambda v: v.repeat(3, -1) / 257,
    "I": lambda v: v.repeat(3, -1) / 257,
    "F": lambda v: v.repeat(3, -1) / 257,
    "P": palette_colours,
    "PA": lambda v: on_white(palette_colours(v[..., :1]), v[..., 1:]),
    "LA": lambda v: on_white(v[..., :1].repeat(3, -1), v[..., 1:]),
    "RGB": lambda v: v,
    "RGBA": lambda v: on_white(v[..., :3], v[..., 3:]),
    "CMYK": lambda v: (255 - v[..., :3]) * (255 - v[..., 3:]) / 255,
    "YCbCr": of_ycbcr,
    "HSV": of_hsv,
    "LAB": of_lab,
}
TOLERANCES = {"HSV": 4.0, "LAB": 4.0, "YCbCr": 1.5}


@pytest.mark.parametrize("mode", FORMULAS)
def test_a_mode_becomes_rgb_as_its_formula_says(mode: str) -> None:
    image = to_rgb(of_mode(mode))
    assert (image.mode, image.size, image.info) == ("RGB", (64, 48), {})
    expected = np.clip(by_formula(mode), 0, 255)
    assert np.abs(np.asarray(image) - expected).max() <= TOLERANCES.get(mode, 1.0)


@pytest.mark.parametrize("mode", ["1", "P", "PA", "RGBA", "CMYK", "LAB", "I;16", "F"])
def test_a_large_image_is_converted_as_its_parts_are(mode: str) -> None:
    image = of_mode(mode, LARGE)
    half = (0, 700, LARGE[0], LARGE[1])
    whole, part = to_rgb(image).crop(half), to_rgb(image.crop(half))
    assert whole.tobytes() == part.tobytes()


def test_rgb_keeps_its_pixels_where_they_are() -> None:
    image = of_mode("RGB")
    image.info["note"] = "x"
    rgb = to_rgb(image)
    assert rgb.im is image.im
    assert rgb.info == {}
