"""The families of models: all that differs from one architecture to another, in one place.

    which classes of transformers load it     Family.architecture, .processor
    what an image becomes on the CPU actor    .has_tiles: uint8 [H, W, 3], or [tiles, H, W, 3]
    how many image tokens an image takes      ImageTokens, asked of the processor itself
    what the model sees in its pixels         .features

The text half of a model is not a matter of its family: `choose.py` says which of them go into
slots. The driver asks it too: torch and transformers are imported where they are needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.engine.pixels import cuts_into_tiles
from schemas.errors import SpecError

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""Width and height."""

_BLANK: Size = (64, 64)
_PROBES: tuple[Size, ...] = (_BLANK, (96, 57), (31, 200), (1, 40))
"""Images whose tokens are counted by the processor as a whole."""


@dataclass(frozen=True)
class Family:
    """Models that transformers runs by one class.

    `architecture`, `config`, `processor`: classes of transformers. `has_tiles`: an image is cut
    into tiles, the more the larger it is, and takes as many places in a prompt as its size asks
    for. `is_fast`: its images travel as bytes, are normalised on the device, and are looked at
    once for all questions; others are asked through `generate`, one prompt at a time (`alone.py`).
    `squares_several`: it was trained on several images in one prompt, and none of them is cut into
    tiles: each is made a square and resized. `example`: a checkpoint on the hub.
    """

    model_type: str
    architecture: str
    config: str
    processor: str
    example: str = ""
    has_tiles: bool = False
    is_fast: bool = True
    squares_several: bool = False

    @property
    def why_slow(self) -> str | None:
        """Null where it is not."""
        if self.is_fast:
            return None
        return (
            f"{self.architecture} is none of {', '.join(f.architecture for f in FAMILIES.values())}"
        )

    @property
    def why_one_image(self) -> str | None:
        """Why its prompts are about one image each; null where they may be about several."""
        if self.is_fast:
            return None
        return f"prompts of a {self.architecture} are about one image each"

    def model_class(self) -> Any:
        return _class(self.architecture)

    def config_class(self) -> Any:
        return _class(self.config)

    def processor_class(self) -> Any:
        if self.processor == "LlavaOnevisionProcessor":
            from pipeline.engine.onevision import ImagesOnly

            return ImagesOnly
        return _class(self.processor)

    def features(
        self, model: Any, pixels: "torch.Tensor", sizes: "torch.Tensor"
    ) -> Sequence["torch.Tensor"]:
        """Of each image, [tokens, hidden]: what stands in place of its image tokens.

        `pixels`: [N, 3, H, W], or [N, tiles, 3, H, W] where the family has tiles and does not leave
        them whole as some of several. `sizes`: int [N, 2], height and width of the whole images.
        """
        options: dict[str, Any] = {"image_sizes": sizes} if self.has_tiles else {}
        if self.squares_several and pixels.dim() == len("NCHW"):
            # One would be taken for an image alone.
            options["batch_num_images"] = [max(len(pixels), 2)]
        found: Sequence[torch.Tensor]
        found = model.get_image_features(pixel_values=pixels, **options).pooler_output
        return found


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            "LlavaProcessor",
            "llava-hf/llava-1.5-7b-hf",
        ),
        Family(
            "vipllava",
            "VipLlavaForConditionalGeneration",
            "VipLlavaConfig",
            "LlavaProcessor",
            "llava-hf/vip-llava-7b-hf",
        ),
        Family(
            "llava_next",
            "LlavaNextForConditionalGeneration",
            "LlavaNextConfig",
            "LlavaNextProcessor",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            has_tiles=True,
        ),
        Family(
            "llava_onevision",
            "LlavaOnevisionForConditionalGeneration",
            "LlavaOnevisionConfig",
            "LlavaOnevisionProcessor",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            has_tiles=True,
            squares_several=True,
        ),
    )
}
"""Those that go the fast path, by `model_type` of config.json."""


def family_named(model_type: str) -> Family | None:
    """Null for what is no model that transformers has for images and text.

    Imports transformers where it is none of FAMILIES: there is no other list of them.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if not isinstance(architecture, str):
        return None
    return Family(model_type, architecture, "AutoConfig", "AutoProcessor", is_fast=False)


class ImageTokens:
    """How many image tokens the processor writes for an image.

    `fixed`: for an image of any size; null where the size decides. Raises SpecError for a processor
    that does not tell beforehand: it is tried out.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._pixels: Any = None
        counted = dict(self._counted())
        self.fixed: int | None = None
        if len(set(counted.values())) == 1 and not cuts_into_tiles(processor.image_processor):
            self.fixed = counted[_BLANK]
            return
        for size, count in counted.items():
            if (told := self._told(size)) != count:
                raise SpecError(
                    f"{type(processor).__name__} writes {count} image tokens for an image of "
                    f"{size[0]} x {size[1]} pixels, but tells {told}: it is not supported"
                )

    def of(self, size: Size, *, among: int = 1) -> int:
        """`among`: of so many images in one prompt."""
        return self._told(size, among=among) if self.fixed is None else self.fixed

    def _counted(self) -> Iterator[tuple[Size, int]]:
        """By going through all that the processor does."""
        processor = self._processor
        for size in _PROBES:
            output = processor(text=processor.image_token, images=Image.new("RGB", size))
            self._pixels = np.asarray(output["pixel_values"][0])
            yield size, output["input_ids"][0].count(processor.image_token_id)

    def _told(self, size: Size, *, among: int = 1) -> int:
        image = {
            "pixel_values": [self._pixels],
            "image_sizes": [(size[1], size[0])],
            "batch_num_images": [among],
        }
        written: str = self._processor.replace_image_token(image, 0)
        return written.count(self._processor.image_token)


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)
