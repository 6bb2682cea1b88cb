"""Every mode of Pillow's to RGB.

Transparency is laid on white. Colour profiles (ICC) are left alone, as LLaVA's processors do.
16-bit grey is scaled from its full range; 32-bit integers and floats (modes I and F) from the
smallest of 0..1 (floats only), 0..255 and 0..65535 that holds all their values, else from their
least to their greatest.

Large images are converted strip by strip: they take up to four bytes a pixel as they were decoded
and four as RGB, and no third copy.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

STRIP_PIXELS = 2**22
FULL_RANGES = (1.0, 255.0, 65535.0)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, without metadata; one that is RGB shares its pixels."""
    convert = _converter(image)
    if convert is None:
        # A new head on the same pixels: `copy` would take the memory twice.
        return Image.Image()._new(image.im)
    if image.width * image.height <= STRIP_PIXELS:
        rgb = convert(image)
        rgb.info.clear()
        return rgb
    rgb = Image.new("RGB", image.size)
    for strip, place in _strips(image):
        rgb.paste(convert(strip), place)
    return rgb


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """What makes RGB of the image or a strip of it; None where it is RGB."""
    if image.mode.startswith("I;16"):
        return lambda strip: _grey(np.asarray(strip).astype(np.float64) / 65535)
    if image.mode in {"I", "F"}:
        bounds = _bounds(image)
        return lambda strip: _grey(_to_unit(np.asarray(strip).astype(np.float64), *bounds))
    if image.has_transparency_data:
        return _on_white
    return None if image.mode == "RGB" else lambda strip: strip.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """The image from top to bottom in strips of STRIP_PIXELS or one row, and where they belong."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(image.height, top + height))
        yield image.crop(box), (0, top)


def _bounds(image: Image.Image) -> tuple[float, float, float]:
    """Of modes I and F: the least and greatest finite value, and the full range they belong to.

    A range of 0 stands for values that no full range holds.
    """
    low, high = np.inf, -np.inf
    for strip, _ in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    low, high = (low, high) if low <= high else (0.0, 0.0)
    ranges = FULL_RANGES if image.mode == "F" else FULL_RANGES[1:]
    return low, high, next((top for top in ranges if low >= 0 and high <= top), 0.0)


def _to_unit(values: np.ndarray, low: float, high: float, top: float) -> np.ndarray:
    """Float64 [H, W] to 0..1, by what `_bounds` gives; not-a-number becomes the least."""
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if top:
        return values / top
    # Halved, so that the span of the greatest floats does not overflow.
    span = high / 2 - low / 2
    return (values / 2 - low / 2) / span if span > 0 else np.zeros_like(values)


def _grey(unit: np.ndarray) -> Image.Image:
    """Float64 [H, W] in 0..1 to an RGB image."""
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")
