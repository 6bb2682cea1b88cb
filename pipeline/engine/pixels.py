"""The image processor in two halves: resizing on the CPU actor, normalising on the device.

What an image processor does after resizing depends on one channel's value alone, so it is a table
of [3 channels, 256 values], made by the processor itself. Looking a pixel up gives, bit for bit,
the float32 that the processor would have computed; a third of the bytes travel.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from schemas.errors import ImageTooLarge, SpecError

if TYPE_CHECKING:
    import torch
    from transformers import LlavaProcessor

_PROBES = ((57, 96), (101, 44))
"""Height and width of two images that must come out alike."""


def resized(processor: "LlavaProcessor", image: Image.Image) -> np.ndarray:
    """An RGB image as the processor resizes and crops it: uint8 [H, W, 3], not normalised."""
    values = _values(processor, image, do_rescale=False, do_normalize=False)
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def check_aspect(processor: "LlavaProcessor", image: Image.Image, *, max_pixels: int) -> None:
    """Raise ImageTooLarge for an image that resizing would blow up.

    A processor that scales the shortest edge to its size scales the longest by as much: a strip of
    one pixel in height becomes larger than any photograph.
    """
    edge = (processor.image_processor.size or {}).get("shortest_edge")
    if edge is None:
        return
    long_side = edge * max(image.size) // min(image.size)
    if edge * long_side > max_pixels:
        raise ImageTooLarge(
            f"the image of {image.width} x {image.height} pixels would be resized to "
            f"{edge} x {long_side}: more than source.max_image_pixels, {max_pixels}; crop it"
        )


def pixel_table(processor: "LlavaProcessor") -> np.ndarray:
    """What the processor makes of each value of each channel: float32 [3, 256].

    Raises SpecError for a processor that cannot be split so: one that cuts an image into tiles,
    gives images of different sizes, or does more than rescale and normalise. It is tried out.
    """
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    untouched = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    values = _values(processor, Image.fromarray(ramp), **untouched)
    if values.shape != (3, 16, 16):
        raise _unsupported(processor, "resizes images that it is told to leave as they are")
    table = values.reshape(3, 256).astype(np.float32)
    noise = np.random.default_rng(0)
    shapes = set()
    for height, width in _PROBES:
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        whole, pixels = _values(processor, image), resized(processor, image)
        shapes.add(whole.shape)
        looked_up = table[np.arange(3)[:, None, None], np.moveaxis(pixels, -1, 0)]
        if pixels.dtype != np.uint8 or not np.array_equal(whole.astype(np.float32), looked_up):
            raise _unsupported(processor, "normalises by more than a table of channel values")
    if len(shapes) > 1:
        raise _unsupported(processor, f"gives images of different sizes: {sorted(shapes)}")
    return table


def normalised(pixels: "torch.Tensor", table: "torch.Tensor") -> "torch.Tensor":
    """uint8 [N, H, W, 3] through float32 [3, 256]: float32 [N, 3, H, W], on the table's device."""
    import torch

    planes = pixels.to(table.device).permute(0, 3, 1, 2).long()
    channel = torch.arange(3, device=table.device)[:, None, None]
    return table[channel, planes]


def _values(processor: "LlavaProcessor", image: Image.Image, **options: bool) -> np.ndarray:
    """The processor's only output for one image: [3, H, W]."""
    output: dict[str, Any] = dict(processor.image_processor(images=image, **options))
    if set(output) != {"pixel_values"}:
        raise _unsupported(processor, f"gives {sorted(output)} where pixel_values are wanted")
    values = np.asarray(output["pixel_values"][0])
    if values.ndim != 3 or values.shape[0] != 3:
        raise _unsupported(processor, f"gives {values.shape} where [3, H, W] is wanted")
    return values


def _unsupported(processor: "LlavaProcessor", why: str) -> SpecError:
    kind = type(processor.image_processor).__name__
    return SpecError(f"the image processor {kind} {why}; this is not supported yet")
