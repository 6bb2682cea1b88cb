"""The bytes of an image to RGB pixels, or the reason why there are none.

What a viewer would show: EXIF orientation is applied, transparency is laid on white, of an
animation the first frame is taken, other modes become RGB as `rgb.py` says. EPS is not read: Pillow
would run Ghostscript on it.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pipeline.rgb import to_rgb
from schemas.errors import ImageCorrupt, ImageEmpty, ImageTooLarge, ImageUnidentified

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
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

Size = tuple[int, int]
"""Width and height."""

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what puts the image upright; from 5 on, width and height change places."""

_settings_lock = threading.Lock()


class Picture(NamedTuple):
    """An RGB image, upright, without metadata, so that nobody turns it again.

    `size` is the whole image's, also where less of it was decoded.
    """

    image: Image.Image
    size: Size


def decode(data: bytes, *, max_pixels: int, allow_truncated: bool = False) -> Image.Image:
    """The whole image in RGB; raises as `decode_picture` does."""
    return decode_picture(data, max_pixels=max_pixels, allow_truncated=allow_truncated).image


def decode_picture(
    data: bytes,
    *,
    max_pixels: int,
    allow_truncated: bool = False,
    enough: Callable[[Size], Size] | None = None,
) -> Picture:
    """The image in RGB. `enough`: of an upright size, the size that will do.

    With `enough`, a JPEG is decoded at a half, a quarter or an eighth of its size where that is no
    less than enough. Raises ImageEmpty, ImageUnidentified, ImageTooLarge (from the header, before
    any pixel is decoded, or where memory runs out) and ImageCorrupt, which covers truncated files
    unless they are allowed.
    """
    if not data:
        raise ImageEmpty("the image has zero bytes; write the file again")
    with _pillow_settings(allow_truncated=allow_truncated):
        try:
            image = _open(data)
            _check_size(image, max_pixels=max_pixels)
            Image.MAX_IMAGE_PIXELS = max_pixels  # for images inside the image, as in ICO
            size = None if enough is None else _reduced(image, enough)
            image.load()
            orientation = _orientation(image)
            size = size or _swapped(image.size, orientation)
            return Picture(_upright(to_rgb(image), orientation), size)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageTooLarge(f"{error}; raise source.max_image_pixels to decode it") from error
        except MemoryError as error:
            raise no_memory() from error
        except DECODER_ERRORS as error:
            if "out of memory" in str(error):
                raise no_memory() from error
            raise ImageCorrupt(f"the image cannot be decoded: {_reason(error)}") from error


@contextmanager
def _pillow_settings(*, allow_truncated: bool) -> Iterator[None]:
    with _settings_lock, warnings.catch_warnings():
        limit, lenient = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        warnings.simplefilter("ignore")
        # Pillow only warns of what is less than twice its limit.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, allow_truncated
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, lenient


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=known_formats())
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
def known_formats() -> tuple[str, ...]:
    """The names of the formats that are read; the first call imports their decoders."""
    Image.preinit()  # the common formats first
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


def _formats_of(data: bytes) -> list[str]:
    """The formats whose first bytes these could be."""
    return [name for name in known_formats() if _accepts(name, data[:PREFIX_BYTES])]


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


def _orientation(image: Image.Image) -> int:
    """As EXIF has it; 1, upright, where EXIF cannot be read or says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _swapped(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation in {5, 6, 7, 8} else size


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TURNED.get(orientation)
    return image if method is None else image.transpose(method)


def _reduced(image: Image.Image, enough: Callable[[Size], Size]) -> Size | None:
    """Have a JPEG decoded at a fraction of its size; gives the whole size, upright, where it is."""
    # Of other formats, some show their orientation and their true size only when they are loaded.
    if image.format not in {"JPEG", "MPO"}:
        return None
    orientation = _orientation(image)
    size = _swapped(image.size, orientation)
    smallest = _swapped(enough(size), orientation)
    if smallest[0] <= image.width and smallest[1] <= image.height:
        image.draft(None, smallest)
    return size


def no_memory() -> ImageTooLarge:
    """What to raise where memory runs out."""
    return ImageTooLarge(
        "decoding the image takes more memory than resources.preprocess.decode_memory_bytes "
        "allows; raise it, or make the image smaller"
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
