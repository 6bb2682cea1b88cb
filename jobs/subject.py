"""The model that `bench` measures, and what has to be known of it to make up prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from jobs.workload import LOOKED_AT, Vocabulary
from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import dtype_name, open_checkpoint
from pipeline.engine.family import ImageTokens
from pipeline.engine.load import device_of, end_tokens, load_family, load_model, load_processor
from pipeline.engine.pixels import pixel_table, resized
from pipeline.engine.reference import random_model, random_processor
from schemas.errors import SpecError
from schemas.job import ModelSpec

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

DTYPE_OF_RANDOM = "bfloat16"


@dataclass(frozen=True)
class Subject:
    """`table`: float32 [3, 256] of `pixels.pixel_table`. `image_shape`: of the resized uint8
    images [H, W, 3], or of their tiles. `dtype`: its name, as in a spec."""

    name: str
    dtype: str
    model: "LlavaForConditionalGeneration"
    processor: "LlavaProcessor"
    table: np.ndarray
    image_shape: tuple[int, ...]
    tokens_per_image: int

    @property
    def end_tokens(self) -> list[int]:
        """Where answers end, unless that is switched off: as a job has it."""
        return end_tokens(self.model, self.processor)

    @property
    def vocabulary(self) -> Vocabulary:
        config = self.model.config
        text = config.get_text_config()
        return Vocabulary(
            size=text.vocab_size,
            image_token_id=config.image_token_id,
            tokens_per_image=self.tokens_per_image,
            context=getattr(text, "max_position_embeddings", None),
        )


def load_subject(spec: ModelSpec) -> Subject:
    """A checkpoint, as a job loads it. Raises SpecError."""
    check_model(spec)
    if why := load_family(spec).why_slow:
        raise SpecError(f"model {spec.path} takes the slow path, which is not measured: {why}")
    dtype = dtype_name(spec, open_checkpoint(spec))
    return _subject(spec.path, dtype, load_model(spec, device_of(spec)), load_processor(spec))


def random_subject(name: str, *, seed: int, dtype: str) -> Subject:
    """A model of `reference.SHAPES`. Raises SpecError for a name that is not there."""
    processor = random_processor(name)
    dtype = DTYPE_OF_RANDOM if dtype == "auto" else dtype
    model = random_model(
        name, seed=seed, dtype=getattr(torch, dtype), device=device_of(ModelSpec())
    )
    return _subject(f"random {name}, seed {seed}", dtype, model, processor)


def save_random(folder: Path, name: str, *, seed: int, dtype: str) -> None:
    """The same as a checkpoint. Raises SpecError."""
    from transformers.utils import logging

    processor = random_processor(name)
    dtype = DTYPE_OF_RANDOM if dtype == "auto" else dtype
    model = random_model(name, seed=seed, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _subject(name: str, dtype: str, model: Any, processor: Any) -> Subject:
    return Subject(
        name=name,
        dtype=dtype,
        model=model,
        processor=processor,
        table=pixel_table(processor),
        image_shape=resized(processor, Image.new("RGB", LOOKED_AT)).shape,
        tokens_per_image=ImageTokens(processor).of(LOOKED_AT),
    )
