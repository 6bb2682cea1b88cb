"""Makes training batches: images drawn or picked, and packed questions about them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import LlavaProcessor

from tools.easy_vqa_data import LabelledImage
from tools.embedded_model import IMAGE_TOKENS, PATCH_PX
from tools.packing import PackedBatch, Packer, collate
from tools.questions import SYSTEM_TEXTS, answer, ask, reworded
from tools.shapes import (
    SIDE_PX,
    background_of,
    disturb,
    draw_at_random,
    moved,
    random_scene,
)

VALIDATION_REQUEST = "Describe the image."
VALIDATION_BATCH = 25
REAL_SHARE = 0.3


@dataclass(frozen=True)
class Example:
    """A 64-pixel image with its labels; `patches` bool [64]: those that the shape touches."""

    pixels: np.ndarray
    colour: str
    shape: str
    patches: np.ndarray


@dataclass(frozen=True)
class Mix:
    """What a batch holds: images, questions about each, weights of their kinds.

    `conversations` is the share of images whose questions are turns; the others' are a tree.
    """

    images: int
    questions: int
    weights: Mapping[str, float] = field(default_factory=dict)
    conversations: float = 0.0


@functools.cache
def loaded(path: Path) -> Image.Image:
    """The image of a file, kept: 12 KB each."""
    return Image.open(path).convert("RGB")


def touched_patches(image: Image.Image) -> np.ndarray:
    """Which of the model's patches differ from the background, bool [64]."""
    differs = np.abs(np.asarray(image).astype(int) - background_of(image)).sum(-1) > 60
    side = SIDE_PX // PATCH_PX
    return differs.reshape(side, PATCH_PX, side, PATCH_PX).any((1, 3)).reshape(-1)


def untouched(labelled: LabelledImage) -> Example:
    """A real image as it is."""
    image = loaded(labelled.path)
    return Example(np.asarray(image), labelled.colour, labelled.shape, touched_patches(image))


class Asker:
    """Draws or picks examples and packs questions about them."""

    def __init__(self, processor: LlavaProcessor, real: list[LabelledImage]) -> None:
        self.tokenizer = processor.tokenizer
        self.real = real
        self.packer = Packer(
            encode=functools.cache(self.encode),
            image_id=self.tokenizer.convert_tokens_to_ids("<image>"),
            eos_id=self.tokenizer.eos_token_id,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, each `<image>` as many times as the model has patches."""
        expanded = text.replace("<image>", "<image>" * IMAGE_TOKENS)
        return list(self.tokenizer(expanded, add_special_tokens=False).input_ids)

    def example(self, rng: random.Random) -> Example:
        """A real training image, moved about, or a freshly drawn one."""
        if rng.random() < REAL_SHARE:
            chosen = rng.choice(self.real)
            colour, shape = chosen.colour, chosen.shape
            image = moved(loaded(chosen.path), rng, can_turn=shape != "triangle")
        else:
            scene = random_scene(rng, largest_px=rng.choice((36.0, 36.0, 48.0)))
            colour, shape = scene.colour, scene.shape
            image = draw_at_random(scene, rng)
        pixels = np.asarray(disturb(image, rng))
        return Example(pixels, colour, shape, touched_patches(image))

    def turns(self, example: Example, mix: Mix, rng: random.Random) -> list[tuple[str, str]]:
        """The mix's number of questions about one image, answered."""
        kinds = rng.choices(tuple(mix.weights), tuple(mix.weights.values()), k=mix.questions)
        turns = []
        for kind in kinds:
            question = ask(kind, colour=example.colour, shape=example.shape, rng=rng)
            reply = answer(question, colour=example.colour, shape=example.shape)
            turns.append((reworded(question) if rng.random() < 0.15 else question, reply))
        return turns

    def batch(self, mix: Mix, rng: random.Random) -> tuple[list[Example], PackedBatch | None]:
        """Examples, and what is asked of them, or None where no question is."""
        examples = [self.example(rng) for _ in range(mix.images)]
        if mix.questions == 0:
            return examples, None
        packed = [
            self.packer.pack(
                self.turns(example, mix, rng),
                system=rng.choice(SYSTEM_TEXTS) if rng.random() < 0.08 else "",
                is_tree=rng.random() >= mix.conversations,
            )
            for example in examples
        ]
        return examples, collate(packed, pad_id=self.tokenizer.pad_token_id)

    def whole(self, images: list[LabelledImage]) -> Iterator[tuple[list[Example], PackedBatch]]:
        """Every easy-VQA question about these images, and a caption, in batches."""
        for start in range(0, len(images), VALIDATION_BATCH):
            part = images[start : start + VALIDATION_BATCH]
            examples = [untouched(image) for image in part]
            packed = [
                self.packer.pack(
                    [
                        *image.questions,
                        (
                            VALIDATION_REQUEST,
                            answer(VALIDATION_REQUEST, colour=e.colour, shape=e.shape),
                        ),
                    ],
                )
                for image, e in zip(part, examples, strict=True)
            ]
            yield examples, collate(packed, pad_id=self.tokenizer.pad_token_id)
