"""What `bench` has both sides answer: images, questions, and how long each answer is.

Lengths are imposed: end tokens are switched off, and every answer has exactly its row's number of
tokens. Images are noise and questions random tokens: what an answer costs depends on neither.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np

from pipeline.engine.request import Branch, ImagePixels, Prefix, Request
from schemas.errors import SpecError

Mode = Literal["vqa", "caption"]

LOOKED_AT = (64, 64)
"""Width and height that every image has before it is resized, or cut into tiles."""
LEAD_TOKENS = 5
"""Of the text in front of the image, the start token included."""
QUESTION_TOKENS = (8, 16)
"""Fewest and most: 12 in the mean."""
CAPTION_TOKENS = 8
"""Of the text behind the image that asks for a caption, the same for all."""
SIGMA = 0.41
"""Of the logarithm of a caption's length: of 64 with a mean of 30 the longest has 74."""


@dataclass(frozen=True)
class Vocabulary:
    """Which token ids there are, and which of them stands for a piece of an image."""

    size: int
    image_token_id: int
    tokens_per_image: int
    context: int | None = None

    def draw(self, rng: np.random.Generator, count: int) -> tuple[int, ...]:
        """Ids of text."""
        ids = rng.integers(0, self.size - 1, count)
        return tuple(int(i) + int(i >= self.image_token_id) for i in ids)


@dataclass(frozen=True)
class Row:
    """One prompt: the image's number, all its ids, and how many tokens its answer has."""

    image: int
    token_ids: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """`images`: uint8 [H, W, 3] each, or its tiles, with its `branches`. `lead`: ids up to the
    image's end."""

    mode: Mode
    images: Sequence[np.ndarray]
    lead: tuple[int, ...]
    branches: Sequence[Sequence[Branch]]

    @cached_property
    def rows(self) -> list[Row]:
        """Every question on every image, as somebody without branches has to ask it."""
        return [
            Row(image, (*self.lead, *branch.token_ids), branch.max_new_tokens)
            for image, branches in enumerate(self.branches)
            for branch in branches
        ]

    def requests(self, look: int) -> list[Request]:
        """The same as requests. An engine that keeps features knows none from another `look`."""
        return [
            Request(Prefix(self.lead, [_looked_at(image, look)]), branches)
            for image, branches in zip(self.images, self.branches, strict=True)
        ]

    def units(self, rows: Sequence[Row]) -> int:
        """What a rate counts: questions in `vqa`, useful tokens in `caption`."""
        return len(rows) if self.mode == "vqa" else sum(row.new_tokens for row in rows)

    @property
    def unit(self) -> str:
        return "questions/s" if self.mode == "vqa" else "useful tokens/s"


def questions(
    vocabulary: Vocabulary,
    images: Sequence[np.ndarray],
    *,
    each: int,
    new_tokens: int,
    seed: int,
) -> Workload:
    """`each` questions on each image, with answers of `new_tokens`.

    Raises SpecError where the model's context is too short for it.
    """
    rng = np.random.default_rng(seed)
    lead = _lead(vocabulary, rng)
    branches = [[_question(vocabulary, rng, new_tokens) for _ in range(each)] for _ in images]
    return _checked(Workload("vqa", images, lead, branches), vocabulary)


def captions(
    vocabulary: Vocabulary, images: Sequence[np.ndarray], *, new_tokens: int, seed: int
) -> Workload:
    """The same question on every image, with answers of `new_tokens` in the mean.

    Raises SpecError where the model's context is too short for it.
    """
    rng = np.random.default_rng(seed)
    lead = _lead(vocabulary, rng)
    asked = vocabulary.draw(rng, CAPTION_TOKENS)
    lengths = rng.permutation(caption_lengths(len(images), mean=new_tokens))
    branches = [[Branch(asked, int(length))] for length in lengths]
    return _checked(Workload("caption", images, lead, branches), vocabulary)


def caption_lengths(count: int, *, mean: float) -> list[int]:
    """Log-normal lengths: the quantiles of evenly spaced probabilities, shortest first."""
    normal = NormalDist(np.log(mean) - SIGMA**2 / 2, SIGMA)
    points = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    return [max(1, round(float(np.exp(point)))) for point in points]


def noise(shape: tuple[int, ...], count: int, *, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def _question(vocabulary: Vocabulary, rng: np.random.Generator, new_tokens: int) -> Branch:
    length = int(rng.integers(QUESTION_TOKENS[0], QUESTION_TOKENS[1], endpoint=True))
    return Branch(vocabulary.draw(rng, length), new_tokens)


def _lead(vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[int, ...]:
    image = (vocabulary.image_token_id,) * vocabulary.tokens_per_image
    return vocabulary.draw(rng, LEAD_TOKENS) + image


def _checked(work: Workload, vocabulary: Vocabulary) -> Workload:
    longest = max(len(row.token_ids) + row.new_tokens for row in work.rows)
    if vocabulary.context is not None and longest > vocabulary.context:
        raise SpecError(
            f"a prompt and its answer have {longest} tokens, more than the model's context of "
            f"{vocabulary.context}: lower --new-tokens"
        )
    return work


def _looked_at(image: np.ndarray, look: int) -> ImagePixels:
    sha256 = hashlib.sha256(image.tobytes() + str(look).encode()).hexdigest()
    return ImagePixels(image, sha256, LOOKED_AT)
