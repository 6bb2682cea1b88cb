"""Images of any resolution: the whole as one tile, and again, larger, cut into tiles.

As LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-OneVision do it: of
the resolutions that a processor knows, the one that keeps most of the image; the image is fitted
into it, with black margins. What transformers' processors do to the bit, by Pillow and numpy alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height."""

_KINDS = ("LlavaNextImageProcessorPil", "LlavaOnevisionImageProcessorPil")
_OF_KIND = (
    "get_image_patches",
    "_resize_for_patching",
    "_pad_for_patching",
    "_get_padding_size",
    "_preprocess",
)
_OF_BACKEND = ("process_image", "resize", "center_crop")


@dataclass(frozen=True)
class Tiles:
    """An RGB image to uint8 [1 + tiles, side, side, 3]: the whole first, then row by row.

    `resolutions`: multiples of `side`, in the order in which a tie is decided.
    """

    resolutions: tuple[Size, ...]
    side: int
    resample: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        target = best_resolution(image.size, self.resolutions)
        fitted = self._resized(image, _fitted(image.size, target))
        canvas = np.zeros((target[1], target[0], 3), np.uint8)
        left, top = (target[0] - fitted.width) // 2, (target[1] - fitted.height) // 2
        canvas[top : top + fitted.height, left : left + fitted.width] = np.asarray(fitted)
        whole = np.asarray(self._resized(image, (self.side, self.side)))
        grid = canvas.reshape(-1, self.side, target[0] // self.side, self.side, 3).swapaxes(1, 2)
        return np.concatenate([whole[None], grid.reshape(-1, self.side, self.side, 3)])

    def check(self, size: Size, *, max_pixels: int) -> None:
        """Nothing grows beyond the largest resolution."""

    def _resized(self, image: Image.Image, size: Size) -> Image.Image:
        return image.resize(size, Image.Resampling(self.resample))


def tiles_of(images: Any) -> Tiles | None:
    """What the settings of an image processor say, where it is of a kind that does as they say."""
    kind = type(images).__name__
    is_known = kind in _KINDS and all(
        getattr(getattr(images, name), "__qualname__", None) == f"{owner}.{name}"
        for owner, names in ((kind, _OF_KIND), ("PilBackend", _OF_BACKEND))
        for name in names
    )
    size, crop = dict(images.size or {}), dict(images.crop_size or {})
    sides = {*size.values(), *(crop.values() if images.do_center_crop else ())}
    if not is_known or len(sides) != 1 or not set(size) <= {"shortest_edge", "height", "width"}:
        return None
    (side,) = sides
    resolutions = tuple((width, height) for height, width in images.image_grid_pinpoints)
    if any(each % side for resolution in resolutions for each in resolution):
        return None
    return Tiles(resolutions, side, int(images.resample))


def best_resolution(size: Size, resolutions: tuple[Size, ...]) -> Size:
    """The one that keeps most of the image's pixels, and of those the one that wastes least."""

    def worth(target: Size) -> tuple[int, int]:
        scale = min(target[0] / size[0], target[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - target[0] * target[1]

    return max(resolutions, key=worth)


def _fitted(size: Size, target: Size) -> Size:
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], min(math.ceil(size[1] * across), target[1])
    return min(math.ceil(size[0] * down), target[0]), target[1]
