"""How prompts become ids and images what the engine is given, by the kind of model.

fast, one size       ids before the image is decoded; pixels as bytes
fast, tiles          ids once the image's size is known; tiles as bytes
slow (`alone.py`)    ids and tensors by the processor as a whole, from the whole image
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline.decode_process import DecodeSettings
from pipeline.decoder import Decoded, settings_of
from pipeline.engine.load import load_family
from pipeline.engine.pixels import AnyResize, Resize, pixel_table, resize_of, resize_of_several
from pipeline.tokenise import Reading, Tokeniser, choices_behind
from schemas.errors import ProcessorRefused, SpecError
from schemas.job import JobSpec

if TYPE_CHECKING:
    from pipeline.engine.wholeprocessor import WholeProcessor

AS_IT_IS = Resize(margin=None, edge=None, fixed=None, resample=0, crop=None)
"""For a processor that is to have the whole image."""


class Reader:
    """Raises SpecError for a processor that the job cannot be done with."""

    def __init__(self, job: JobSpec, processor: Any, tokeniser: Tokeniser) -> None:
        self._tokeniser = tokeniser
        self._whole: WholeProcessor | None = None
        self._places: int | None = None
        resize: AnyResize = AS_IT_IS
        self._family = load_family(job.model)
        if self._family.is_fast:
            pixel_table(processor)
            resize = resize_of(processor)
            self._places = tokeniser.image_tokens.fixed
        else:
            from pipeline.engine import wholeprocessor

            self._whole = wholeprocessor.WholeProcessor(processor)
        if job.source.decode == "fast" and (self._whole or not isinstance(resize, Resize)):
            raise SpecError(
                f"source.decode is fast, but how large {type(processor.image_processor).__name__} "
                "makes an image is not known beforehand; set source.decode to exact"
            )
        self.settings: DecodeSettings = settings_of(job, resize)
        self._job, self._processor = job, processor

    @functools.cached_property
    def settings_of_several(self) -> DecodeSettings:
        """How images are decoded that are not alone in their prompts."""
        resize = self._resize_of_several
        return self.settings if resize is None else settings_of(self._job, resize)

    @functools.cached_property
    def _resize_of_several(self) -> Resize | None:
        """Null where it is that of one."""
        return resize_of_several(self._processor) if self._family.squares_several else None

    def check(self, images: int) -> None:
        """Raises ProcessorRefused for a prompt about more images than the model takes."""
        if images == 1:
            return
        why = self._family.why_one_image
        if self._family.squares_several and self._resize_of_several is None:
            kind = type(self._processor.image_processor).__name__
            why = f"{kind} resizes several in a way of its own, which is not supported"
        if why is not None:
            raise ProcessorRefused(f"the row has {images} images, and {why}; give it one")

    @property
    def may_see_several(self) -> bool:
        """Whether the model was trained on several images in a prompt."""
        return self._family.squares_several

    def always(self, images: int) -> Reading | None:
        """How prompts about so many images are read, whatever is in them; null where it depends."""
        return None if self._places is None else self._tokeniser.placing(*[self._places] * images)

    def of(self, images: Sequence[Decoded]) -> Reading:
        """How prompts about these images are read."""
        if self._whole is None:
            tokens, among = self._tokeniser.image_tokens, len(images)
            sizes = [(image.width, image.height) for image in images]
            return self._tokeniser.placing(*[tokens.of(size, among=among) for size in sizes])
        [image] = images
        ids = functools.partial(self._whole.ids, image=Image.fromarray(image.array))
        choices = functools.partial(choices_behind, tokenised=ids)
        return Reading(ids, choices, self._tokeniser.check)

    def pixels(self, image: Decoded) -> dict[str, Any]:
        """What of an image travels, as columns of PREPARED. Raises PromptError."""
        if self._whole is None:
            return {"pixels": image.pixels, "pixels_shape": image.shape}
        return {"pixels": self._whole.of_image(Image.fromarray(image.array))}
