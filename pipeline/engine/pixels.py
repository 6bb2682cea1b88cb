"""The image processor in two halves: resizing on the CPU actor, normalising on the device.

What an image processor does after resizing depends on one channel's value alone, so it is a table
of [3 channels, 256 values], made by the processor itself. Looking a pixel up gives, bit for bit,
the float32 that the processor would have computed; a third of the bytes travel.

What it does before is told in `Resize`, or in `Tiles` where it cuts images into tiles, if it is
one of those that LLaVA's checkpoints come with: the same pixels by Pillow alone, without the copies
that transformers makes of the whole image, in a process that never imports transformers. Both
halves are tried out on a few images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.engine.tiles import Tiles, tiles_of
from schemas.errors import ImageTooLarge, SpecError

if TYPE_CHECKING:
    import torch
    from transformers import LlavaProcessor

Size = tuple[int, int]
"""Width and height."""

_PROBES: tuple[Size, ...] = ((96, 57), (44, 101))
"""Images that must come out alike."""
_RESIZE_PROBES: tuple[Size, ...] = (*_PROBES, (31, 31), (700, 1001), (1200, 467))

_KNOWN_STEPS = {
    "process_image": {"PilBackend.process_image"},
    "resize": {"PilBackend.resize"},
    "center_crop": {"PilBackend.center_crop"},
    "_preprocess": {"PilBackend._preprocess", "LlavaImageProcessorPil._preprocess"},
}
"""The methods whose doing `Resize` repeats, by what they are called in transformers."""
_BESIDE_PIXELS = frozenset({"image_sizes", "batch_num_images"})
"""What an image processor may say of an image beside its pixels: it is known here already."""


@dataclass(frozen=True)
class Resize:
    """An RGB image as an image processor resizes and crops it, in this order.

    `margin`: the colour that makes it a square. `edge`: what the shortest edge becomes. `fixed`:
    what the whole becomes. `crop`: what stays of its middle, black where it is smaller.
    """

    margin: tuple[int, ...] | None
    edge: int | None
    fixed: Size | None
    resample: int
    crop: Size | None

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self._target(self._padded(image.size))
        if self.margin is not None:
            image = _squared(image, self.margin)
        if image.size != size:
            image = image.resize(size, Image.Resampling(self.resample))
        return image if self.crop is None else _cropped(image, self.crop)

    def check(self, size: Size, *, max_pixels: int) -> None:
        """Raise ImageTooLarge for an image that grows beyond the limit on its way.

        A processor that scales the shortest edge to its size scales the longest by as much: a strip
        of one pixel in height becomes larger than any photograph.
        """
        padded = self._padded(size)
        for width, height in (padded, self._target(padded)):
            if width * height > max(max_pixels, size[0] * size[1]):
                raise _too_large(size, (width, height), max_pixels)

    def enough(self, size: Size, factor: float) -> Size:
        """What is `factor` times as large as the image will be when it is resized."""
        padded = self._padded(size)
        target = self._target(padded)
        width = -int(-factor * size[0] * target[0] // padded[0])
        height = -int(-factor * size[1] * target[1] // padded[1])
        return max(1, width), max(1, height)

    def _padded(self, size: Size) -> Size:
        return size if self.margin is None else (max(size), max(size))

    def _target(self, size: Size) -> Size:
        if self.edge is None:
            return self.fixed or size
        longest = int(self.edge * max(size) / min(size))
        return (self.edge, longest) if size[0] <= size[1] else (longest, self.edge)


@dataclass(frozen=True)
class ProcessorResize:
    """The same by the image processor itself, where nobody knows what it does."""

    image_processor: Any

    def __call__(self, image: Image.Image) -> np.ndarray:
        values = _values(self.image_processor, image, do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(np.moveaxis(values, -3, -1))

    def check(self, size: Size, *, max_pixels: int) -> None:
        if cuts_into_tiles(self.image_processor):
            return
        edge = (self.image_processor.size or {}).get("shortest_edge")
        longest = edge * max(size) // min(size) if edge else 0
        if edge and edge * longest > max_pixels:
            raise _too_large(size, (edge, longest), max_pixels)


AnyResize = Resize | Tiles | ProcessorResize
"""An RGB image as it travels: to uint8 [H, W, 3], or [tiles, H, W, 3]."""


def resize_of(processor: "LlavaProcessor") -> AnyResize:
    """What resizes as the processor does, as far as that has been tried out; it can be pickled."""
    images = processor.image_processor
    resize = tiles_of(images) if cuts_into_tiles(images) else _known(images)
    by_processor = ProcessorResize(images)
    if resize is None:
        return by_processor
    probes = list(_noise(_RESIZE_PROBES))
    is_same = all(resize(image).tobytes() == by_processor(image).tobytes() for image in probes)
    return resize if is_same else by_processor


def resize_of_several(processor: "LlavaProcessor") -> Resize | None:
    """What a processor does with each of several images in a prompt that cuts into tiles only what
    is alone: makes it a square, and resizes that. Null for one that does
    otherwise: it is tried out.
    """
    images = processor.image_processor
    side = max(dict(images.size).values())
    margin = tuple(int(mean * 255) for mean in images.image_mean)
    resize = Resize(margin, None, (side, side), int(images.resample), crop=None)
    for image in _noise(_RESIZE_PROBES):
        pair = images(images=[[image, image]], do_rescale=False, do_normalize=False)
        theirs = np.asarray(pair["pixel_values"][0])
        if not np.array_equal(theirs, np.moveaxis(np.asarray(resize(image)), -1, 0)[None]):
            return None
    return resize


def resized(processor: "LlavaProcessor", image: Image.Image) -> np.ndarray:
    """An RGB image as the processor resizes and crops it: uint8 [H, W, 3] or [tiles, H, W, 3], not
    normalised."""
    return ProcessorResize(processor.image_processor)(image)


def pixel_table(processor: "LlavaProcessor") -> np.ndarray:
    """What the processor makes of each value of each channel: float32 [3, 256].

    Raises SpecError for a processor that cannot be split so: one that gives images, or tiles, of
    different sizes, or does more than rescale and normalise. It is tried out.
    """
    images = processor.image_processor
    table = _ramp(images).reshape(3, 256).astype(np.float32)
    shapes = set()
    for image in _noise(_PROBES):
        whole = _values(images, image)
        pixels = _values(images, image, do_rescale=False, do_normalize=False)
        shapes.add(whole.shape[-3:])
        looked_up = table[np.arange(3)[:, None, None], pixels]
        if pixels.dtype != np.uint8 or not np.array_equal(whole.astype(np.float32), looked_up):
            raise _unsupported(images, "normalises by more than a table of channel values")
    if len(shapes) > 1:
        raise _unsupported(images, f"gives images of different sizes: {sorted(shapes)}")
    return table


def normalised(pixels: "torch.Tensor", table: "torch.Tensor") -> "torch.Tensor":
    """uint8 [..., H, W, 3] through float32 [3, 256], where the table is: [..., 3, H, W]."""
    import torch

    from pipeline.engine.transfer import sent

    planes = sent(pixels, table.device).movedim(-1, -3).long()
    channel = torch.arange(3, device=table.device)[:, None, None]
    return table[channel, planes]


def _ramp(images: Any) -> np.ndarray:
    """What becomes of all values of a channel: [3, 16, 16], row by row."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    untouched: dict[str, Any] = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    if cuts_into_tiles(images):
        whole = {"height": 16, "width": 16}
        untouched |= {"image_grid_pinpoints": [[16, 16]], "size": whole, "crop_size": whole}
    values = _values(images, Image.fromarray(ramp), **untouched)
    if values.shape[-3:] != (3, 16, 16):
        raise _unsupported(images, "resizes images that it is told to leave as they are")
    return values if values.ndim == len("CHW") else values[0]


def cuts_into_tiles(images: Any) -> bool:
    """An image processor, by its settings."""
    return getattr(images, "image_grid_pinpoints", None) is not None


def _known(images: Any) -> Resize | None:
    """What the processor's settings say, where it is of a kind that does as they say."""
    made_of = {name: getattr(images, name, None) for name in _KNOWN_STEPS}
    is_known = all(
        getattr(step, "__qualname__", None) in _KNOWN_STEPS[name] for name, step in made_of.items()
    )
    size, crop = dict(images.size or {}), dict(images.crop_size or {})
    has_one_size = set(size) in ({"shortest_edge"}, {"height", "width"})
    is_llava = is_known and images._preprocess.__qualname__.startswith("Llava")
    if not is_known or not has_one_size or (images.do_pad and not is_llava):
        return None
    is_fixed = images.do_resize and "height" in size
    return Resize(
        margin=tuple(int(x * 255) for x in images.image_mean) if images.do_pad else None,
        edge=size.get("shortest_edge") if images.do_resize else None,
        fixed=(size["width"], size["height"]) if is_fixed else None,
        resample=int(images.resample),
        crop=(crop["width"], crop["height"]) if images.do_center_crop else None,
    )


def _squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(image: Image.Image, size: Size) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _noise(sizes: tuple[Size, ...]) -> Iterator[Image.Image]:
    noise = np.random.default_rng(0)
    for width, height in sizes:
        yield Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _values(images: Any, image: Image.Image, **options: Any) -> np.ndarray:
    """What the image processor makes of one image: [3, H, W], or [tiles, 3, H, W]."""
    output: dict[str, Any] = dict(images(images=image, **options))
    has_tiles = cuts_into_tiles(images)
    if set(output) - (_BESIDE_PIXELS if has_tiles else set()) != {"pixel_values"}:
        raise _unsupported(images, f"gives {sorted(output)} where pixel_values are wanted")
    values = np.asarray(output["pixel_values"][0])
    wanted = "[tiles, 3, H, W]" if has_tiles else "[3, H, W]"
    if values.ndim != wanted.count(",") + 1 or values.shape[-3] != 3:
        raise _unsupported(images, f"gives {values.shape} where {wanted} is wanted")
    return values


def _too_large(size: Size, grown: Size, max_pixels: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"the image of {size[0]} x {size[1]} pixels would be resized to {grown[0]} x {grown[1]}: "
        f"more than source.max_image_pixels, {max_pixels}; crop it"
    )


def _unsupported(images: Any, why: str) -> SpecError:
    kind = type(images).__name__
    return SpecError(f"the image processor {kind} {why}; this is not supported yet")
