"""Resizing by Pillow alone, against the image processors that it stands for."""

import functools
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from pipeline.engine.pixels import AnyResize, ProcessorResize, Resize, resize_of
from pipeline.engine.tiles import Tiles
from schemas.errors import ImageTooLarge
from tests.models import noise_image

CLIP_336 = CLIPImageProcessorPil(
    size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
)
KNOWN = {
    "LLaVA-1.5": CLIP_336,
    "SigLIP": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "LLaVA with margins": LlavaImageProcessorPil(do_pad=True),
    "LLaVA without": LlavaImageProcessorPil(do_pad=False),
    "a crop larger than the image": CLIPImageProcessorPil(
        size={"shortest_edge": 50}, crop_size={"height": 125, "width": 71}
    ),
    "a crop alone": CLIPImageProcessorPil(do_resize=False),
    "a square": CLIPImageProcessorPil(size={"height": 99, "width": 90}, do_center_crop=False),
    "BLIP": BlipImageProcessorPil(),
    "ViT": ViTImageProcessorPil(),
}
NEXT_336 = LlavaNextImageProcessorPil(
    size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
)
TILED = {
    "LLaVA-NeXT": NEXT_336,
    "LLaVA-NeXT, largest first": LlavaNextImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_grid_pinpoints=[[192, 192], [64, 192], [128, 128], [128, 64], [64, 128]],
    ),
    "LLaVA-OneVision": LlavaOnevisionImageProcessorPil(),
}
UNKNOWN = {
    "another way to crop": ConvNextImageProcessorPil(size={"shortest_edge": 64}),
    "a longest edge": CLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 90}),
    "margins at the end": CLIPImageProcessorPil(do_pad=True, pad_size={"height": 9, "width": 9}),
}
SIZES = [(640, 480), (333, 500), (336, 336), (17, 900), (2, 3), (1, 1), (1201, 37), (351, 337)]


@functools.cache
def resize_by(image_processor: Any) -> AnyResize:
    return resize_of(SimpleNamespace(image_processor=image_processor))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_known_processor_is_replaced_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    resize = resize_by(KNOWN[name])
    assert isinstance(resize, Resize)
    image = noise_image(3, width=size[0], height=size[1])
    expected = KNOWN[name](images=image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(np.moveaxis(np.asarray(resize(image)), -1, 0), expected)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_known_way_to_cut_tiles_is_replaced_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    resize = resize_by(TILED[name])
    assert isinstance(resize, Tiles)
    image = noise_image(3, width=size[0], height=size[1])
    expected = TILED[name](images=image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(np.moveaxis(resize(image), -1, -3), expected)


def test_tiles_that_are_made_otherwise_are_left_to_their_processor() -> None:
    uneven = LlavaNextImageProcessorPil(
        size={"shortest_edge": 50},
        crop_size={"height": 40, "width": 40},
        image_grid_pinpoints=[[80, 40], [40, 80]],
    )
    resize = resize_by(uneven)
    assert isinstance(resize, ProcessorResize)
    image = noise_image(3, width=90, height=70)
    expected = uneven(images=image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(np.moveaxis(resize(image), -1, -3), expected)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_processor_does_it_itself(name: str) -> None:
    assert isinstance(resize_by(UNKNOWN[name]), ProcessorResize)


def test_an_unknown_processor_gives_its_own_pixels_in_another_process() -> None:
    processor = UNKNOWN["another way to crop"]
    resize = pickle.loads(pickle.dumps(resize_by(processor)))
    image = noise_image(3, width=90, height=70)
    expected = processor(images=image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(np.moveaxis(np.asarray(resize(image)), -1, 0), expected)


@pytest.mark.parametrize(
    ("name", "size", "grown"),
    [
        ("LLaVA-1.5", (1, 20_000), "336 x 6720000"),
        ("LLaVA-1.5", (20_000, 1), "6720000 x 336"),
        ("LLaVA with margins", (20_000, 1), "20000 x 20000"),
    ],
)
def test_an_image_that_grows_beyond_the_limit_is_too_large(
    name: str, size: tuple[int, int], grown: str
) -> None:
    resize = resize_by(KNOWN[name])
    with pytest.raises(ImageTooLarge, match=grown):
        resize.check(size, max_pixels=1_000_000)
    resize.check((4, 3), max_pixels=1_000_000)


def test_a_processor_that_enlarges_is_no_reason_to_refuse_what_is_within_the_limit() -> None:
    resize_by(KNOWN["LLaVA-1.5"]).check((10, 10), max_pixels=336 * 336)
    with pytest.raises(ImageTooLarge, match="336 x 336"):
        resize_by(KNOWN["LLaVA-1.5"]).check((10, 10), max_pixels=336 * 336 - 1)


@pytest.mark.parametrize(
    ("name", "size", "enough"),
    [
        ("LLaVA-1.5", (4000, 3000), (896, 672)),
        ("LLaVA-1.5", (3000, 4000), (672, 896)),
        ("SigLIP", (4000, 3000), (768, 768)),
        ("LLaVA with margins", (4000, 3000), (448, 336)),
        ("a crop alone", (4000, 3000), (8000, 6000)),
    ],
)
def test_enough_is_a_multiple_of_what_the_image_becomes(
    name: str, size: tuple[int, int], enough: tuple[int, int]
) -> None:
    resize = resize_by(KNOWN[name])
    assert isinstance(resize, Resize)
    assert resize.enough(size, 2.0) == enough


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = Image.effect_noise((336, 336), 50).convert("RGB")
    resize = resize_by(KNOWN["LLaVA-1.5"])
    assert resize(image).tobytes() == image.tobytes()
