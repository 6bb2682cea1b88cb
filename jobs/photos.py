"""Made-up photographs, as JPEGs and in tar shards: what costs as much to decode as real ones."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 90
SIZE = (640, 480)
DIFFERENT = 16
"""Photographs of a source; the others repeat them, with other bytes."""
IMAGES_PER_SHARD = 64


def photo(size: tuple[int, int], *, seed: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as it does in photographs."""
    draw = np.random.default_rng(seed)
    light = 60 * _field(size, draw)
    tint = np.stack([14 * _field(size, draw) for _ in range(3)], axis=-1)
    grain = draw.normal(0, 4, (size[1], size[0], 1))
    pixels = np.clip(128 + light[..., None] + tint + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _field(size: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose amplitude falls as frequency ** -1.3: [H, W]."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(draw.standard_normal((height, width))) / frequency**1.3
    values = np.fft.irfft2(spectrum, (height, width))
    scaled: np.ndarray = values / values.std()
    return scaled


def jpeg(image: Image.Image, *, comment: str | None = None) -> bytes:
    """The image at quality 90; a comment makes other bytes of the same picture."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, **({"comment": comment} if comment else {}))
    return file.getvalue()


def write_shards(folder: Path, count: int, *, seed: int) -> None:
    """`count` photographs of no two the same bytes, as `00000.tar` and so on."""
    folder.mkdir()
    members = _members(count, seed)
    for shard in range(-(-count // IMAGES_PER_SHARD)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for name, data in itertools.islice(members, IMAGES_PER_SHARD):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _members(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    pictures = [photo(SIZE, seed=seed + n) for n in range(min(DIFFERENT, count))]
    for number in range(count):
        data = jpeg(pictures[number % len(pictures)], comment=f"photograph {number}")
        yield f"{number:06}.jpg", data
