"""Reads easy-VQA (PyPI `easy-vqa`, MIT): labelled images and their questions."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

from tools.questions import kind_of
from tools.shapes import COLOURS, SHAPES

VALIDATION_IMAGES = 400


@dataclass(frozen=True)
class LabelledImage:
    """An image, the colours and shapes its questions leave possible, and those questions."""

    image_id: int
    path: Path
    colours: frozenset[str]
    shapes: frozenset[str]
    questions: tuple[tuple[str, str], ...]

    @property
    def is_certain(self) -> bool:
        """Whether the questions leave exactly one colour and one shape."""
        return len(self.colours) == len(self.shapes) == 1

    @property
    def colour(self) -> str:
        (colour,) = self.colours
        return colour

    @property
    def shape(self) -> str:
        (shape,) = self.shapes
        return shape


def load_split(split: str) -> list[LabelledImage]:
    """The images of `train` or `test`, by id."""
    read = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    get_questions, get_paths = read[split]
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*get_questions(), strict=True):
        asked[image_id].append((question, answer))
    return [
        LabelledImage(
            image_id=image_id,
            path=Path(path),
            colours=possible(asked[image_id], frozenset(COLOURS)),
            shapes=possible(asked[image_id], frozenset(SHAPES)),
            questions=tuple(asked[image_id]),
        )
        for image_id, path in sorted(get_paths().items())
    ]


def load_training() -> tuple[list[LabelledImage], list[LabelledImage]]:
    """The training split's images of certain colour and shape: to train on, and held out."""
    certain = [image for image in load_split("train") if image.is_certain]
    random.Random(0).shuffle(certain)
    return certain[VALIDATION_IMAGES:], certain[:VALIDATION_IMAGES]


def possible(questions: list[tuple[str, str]], values: frozenset[str]) -> frozenset[str]:
    """The values (colours, or shapes) that no answer rules out."""
    left = values
    for question, answer in questions:
        named = values & set(re.findall(r"\w+", question))
        if answer in values:
            left &= {answer}
        elif named and answer in ("yes", "no"):
            is_there = (answer == "yes") == (kind_of(question) == "presence")
            left = left & named if is_there else left - named
        elif named:
            left &= named
    return left
