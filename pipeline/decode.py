"""The bytes of an image to RGB pixels, or the reason why there are none.

What a viewer would show: EXIF orientation is applied, transparency is laid on white, of an
animation the first frame is taken. Colour profiles (ICC) are left alone, as LLaVA's processors do.
16-bit grey is scaled from its full range; 32-bit integers and floats (modes I and F) from the
smallest of 0..1 (floats only), 0..255 and 0..65535 that holds all their values, else from their
least to their greatest. EPS is not read: Pillow would run Ghostscript on it.

Knows nothing of rows, models or processors. Pillow's own size limit, its warnings and its switch
for truncated files belong to the process: they are set for the duration of one decode, under a
lock, and put back. So decodes of one process take turns.
"""

import functools
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from schemas.errors import ImageCorrupt, ImageEmpty, ImageTooLarge, ImageUnidentified

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on bytes that are not what they seem (found by changing bytes)."""

NOT_READ = frozenset({"EPS"})
PREFIX_BYTES = 16  # as many as Pillow hands to its decoders to recognise a format

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what puts the image upright."""

_settings_lock = threading.Lock()


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image as Pillow's RGB, without metadata, so that nobody turns it upright again.

    Raises ImageEmpty, ImageUnidentified, ImageTooLarge (from the header, before any pixel is
    decoded) and ImageCorrupt, which covers truncated files too.
    """
    if not data:
        raise ImageEmpty("the image has zero bytes; write the file again")
    with _pillow_settings():
        try:
            image = _open(data)
            _check_size(image, max_pixels=max_pixels)
            Image.MAX_IMAGE_PIXELS = max_pixels  # for images inside the image, as in ICO
            image.load()
            rgb = _to_rgb(_upright(image))
        except Image.DecompressionBombError as error:
            raise ImageTooLarge(f"{error}; raise source.max_image_pixels to decode it") from error
        except DECODER_ERRORS as error:
            raise ImageCorrupt(f"the image cannot be decoded: {_reason(error)}") from error
    rgb.info.clear()
    return rgb


@contextmanager
def _pillow_settings() -> Iterator[None]:
    with _settings_lock, warnings.catch_warnings():
        limit, lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        warnings.simplefilter("ignore")
        try:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, lenient


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        kinds = _formats_of(data)
        if kinds:
            raise ImageCorrupt(
                f"the image starts like {' or '.join(kinds)} but its header is broken or cut off"
            ) from error
        raise ImageUnidentified(
            f"no image format starts with the bytes {data[:8]!r}; is it an image?"
        ) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.preinit()  # the common formats first
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


def _formats_of(data: bytes) -> list[str]:
    """The formats whose first bytes these could be."""
    return [name for name in _formats() if _accepts(name, data[:PREFIX_BYTES])]


def _accepts(name: str, prefix: bytes) -> bool:
    _, accept = Image.OPEN[name]
    try:
        return accept is not None and bool(accept(prefix))
    except (IndexError, struct.error):  # fewer bytes than the format's mark
        return False


def _check_size(image: Image.Image, *, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height} pixels, more than the "
            f"{max_pixels} of source.max_image_pixels; raise it to decode this image"
        )
    if width * height == 0:
        raise ImageCorrupt(f"the image has {width} x {height} pixels: none")


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says; EXIF that cannot be read says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 65535)
    if image.mode in {"I", "F"}:
        return _grey(_to_unit(np.asarray(image).astype(np.float64), is_float=image.mode == "F"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_unit(values: np.ndarray, *, is_float: bool) -> np.ndarray:
    """Float64 [H, W] to 0..1, as the module's docstring says; not-a-number becomes the least."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    for top in (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0):
        if low >= 0 and high <= top:
            return values / top
    # Halved, so that the span of the greatest floats does not overflow.
    span = high / 2 - low / 2
    return (values / 2 - low / 2) / span if span > 0 else np.zeros_like(values)


def _grey(unit: np.ndarray) -> Image.Image:
    """Float64 [H, W] in 0..1 to an RGB image."""
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the decoder asked for more memory than there is"
    return str(error) or type(error).__name__
