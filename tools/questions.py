"""What the embedded model is asked about a scene, and the right answers.

The wordings are easy-VQA's 24 templates, plus requests for a caption. Knows nothing of pixels.
"""

from __future__ import annotations

import random
import re

from tools.shapes import COLOURS, SHAPES

PRESENCE = (
    "is there a {thing}?",
    "is there a {thing} in the image?",
    "does the image contain a {thing}?",
    "is a {thing} present?",
)
ABSENCE = (
    "is there not a {thing}?",
    "is there not a {thing} in the image?",
    "does the image not contain a {thing}?",
    "is no {thing} present?",
)
COLOUR_OF = ("what color is the {thing}?", "what is the color of the {thing}?")
SHAPE_OF = (
    "what is the {colour} shape?",
    "what shape does the image contain?",
    "what shape is in the image?",
    "what shape is present?",
)
CAPTION_REQUESTS = (
    "Describe the image in one sentence.",
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "What is in this image?",
    "What does the image show?",
    "Caption this image.",
    "Write a caption for this image.",
)
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You answer questions about images.",
    "Answer the question using a single word or phrase.",
)
KINDS = ("presence", "absence", "colour", "shape", "caption")


def caption(colour: str, shape: str) -> str:
    """The caption of a scene."""
    return f"A {colour} {shape} on a light background."


def kind_of(question: str) -> str:
    """Which of `KINDS` a question in these wordings is."""
    if question in CAPTION_REQUESTS:
        return "caption"
    lowered = question.lower()
    if re.search(r"\b(not|no)\b", lowered):
        return "absence"
    if not lowered.startswith("what"):
        return "presence"
    return "colour" if re.search(r"\bcolou?r\b", lowered) else "shape"


def answer(question: str, *, colour: str, shape: str) -> str:
    """The right answer to a question in these wordings."""
    kind = kind_of(question)
    if kind == "caption":
        return caption(colour, shape)
    if kind == "colour":
        return colour
    if kind == "shape":
        return shape
    asked = set(re.findall(r"\w+", question.lower())) & {*COLOURS, *SHAPES}
    present = bool(asked & {colour, shape})
    return "yes" if present == (kind == "presence") else "no"


def ask(kind: str, *, colour: str, shape: str, rng: random.Random) -> str:
    """A question of this kind; half of those about presence name what is there."""
    if kind == "caption":
        return rng.choice(CAPTION_REQUESTS)
    if kind == "colour":
        return rng.choice(COLOUR_OF).format(thing=rng.choice((shape, "shape")))
    if kind == "shape":
        return rng.choice(SHAPE_OF).format(colour=colour)
    template = rng.choice(PRESENCE if kind == "presence" else ABSENCE)
    if rng.random() < 0.5:
        thing = shape if rng.random() < 0.5 else rng.choice([s for s in SHAPES if s != shape])
    else:
        others = [other for other in COLOURS if other != colour]
        thing = f"{colour if rng.random() < 0.5 else rng.choice(others)} shape"
    return template.format(thing=thing)


def reworded(question: str) -> str:
    """The question as a person would type it: a capital letter, British spelling."""
    return (question[0].upper() + question[1:]).replace("color", "colour")


def every_question() -> list[str]:
    """Every wording filled in with every colour and shape."""
    things = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)]
    return [
        *(t.format(thing=thing) for t in (*PRESENCE, *ABSENCE) for thing in things),
        *(t.format(thing=thing) for t in COLOUR_OF for thing in (*SHAPES, "shape")),
        *(SHAPE_OF[0].format(colour=colour) for colour in COLOURS),
        *SHAPE_OF[1:],
        *CAPTION_REQUESTS,
    ]
