"""The model that `bench` measures, and what has to be known of it to make up prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from jobs.workload import Vocabulary
from pipeline.engine.checkpoint import check_model, dtype_name, open_checkpoint
from pipeline.engine.load import device_of, load_model, load_processor
from pipeline.engine.pixels import pixel_table, resized
from pipeline.engine.reference import clip_table, random_model
from pipeline.tokenise import tokens_per_image
from schemas.job import ModelSpec

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

DTYPE_OF_RANDOM = "bfloat16"


@dataclass(frozen=True)
class Subject:
    """`table`: float32 [3, 256] of `pixels.pixel_table`. `image_shape`: of the resized uint8
    images [H, W, 3]. `dtype`: its name, as in a spec."""

    name: str
    dtype: str
    model: "LlavaForConditionalGeneration"
    table: np.ndarray
    image_shape: tuple[int, ...]
    tokens_per_image: int

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
    processor = load_processor(spec)
    return Subject(
        name=spec.path,
        dtype=dtype_name(spec, open_checkpoint(spec)),
        model=load_model(spec, device_of(spec)),
        table=pixel_table(processor),
        image_shape=resized(processor, Image.new("RGB", (64, 64))).shape,
        tokens_per_image=tokens_per_image(processor),
    )


def random_subject(name: str, *, seed: int, dtype: str) -> Subject:
    """A model of `reference.SHAPES`. Raises SpecError for a name that is not there."""
    dtype = DTYPE_OF_RANDOM if dtype == "auto" else dtype
    device = device_of(ModelSpec())
    model = random_model(name, seed=seed, dtype=getattr(torch, dtype), device=device)
    side = model.config.vision_config.image_size
    return Subject(
        name=f"random {name}, seed {seed}",
        dtype=dtype,
        model=model,
        table=clip_table(),
        image_shape=(side, side, 3),
        tokens_per_image=model.config.image_seq_length,
    )
