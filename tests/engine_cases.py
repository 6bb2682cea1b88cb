"""Prompts about images for engines, and what `generate` says to each of them alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.engine.pixels import resized
from pipeline.engine.request import Branch, ImagePixels, Prefix, Request
from tests.models import noise_image, questions

EOS = (2, 31, 57)
"""31 and 57 are tokens that the random models say often: some answers end with them."""


@dataclass(frozen=True)
class Case:
    """One question about one image, and how long the answer may be."""

    image: Image.Image
    prompt: str
    longest: int


def cases_of(images: int, questions_each: int) -> list[Case]:
    """Questions of all lengths, those on one image far from each other."""
    texts = questions(images * questions_each)
    return [
        Case(noise_image(i % images), f"USER: <image>\n{text} ASSISTANT:", 3 + i % 9)
        for i, text in enumerate(texts)
    ]


def request_of(processor: Any, *cases: Case) -> Request:
    """One request: the prompts agree up to the image."""
    image = cases[0].image
    ids = [processor(text=c.prompt, images=image)["input_ids"][0] for c in cases]
    last = max(i for i, token in enumerate(ids[0]) if token == processor.image_token_id)
    sha256 = hashlib.sha256(image.tobytes()).hexdigest()
    pixels = ImagePixels(resized(processor, image), sha256)
    branches = [Branch(one[last + 1 :], c.longest) for one, c in zip(ids, cases, strict=True)]
    return Request(Prefix(ids[0][: last + 1], [pixels]), branches)


@dataclass(frozen=True)
class Expected:
    """What `generate` says, the end token included."""

    tokens: Sequence[int]
    mean_logprob: float


def alone(model: Any, processor: Any, case: Case) -> Expected:
    """What `generate` says on this one prompt, unpadded."""
    inputs = processor(text=case.prompt, images=case.image, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    whole = model.generate(
        **inputs, max_new_tokens=case.longest, do_sample=False, eos_token_id=list(EOS)
    )
    with torch.inference_mode():
        inputs["input_ids"], inputs["attention_mask"] = whole, torch.ones_like(whole)
        logits = model(**inputs).logits[0, start - 1 : -1].float()
    said = whole[0, start:]
    logprob = logits.log_softmax(-1).gather(-1, said[:, None]).mean().item()
    return Expected(said.tolist(), logprob)


def check(answer: Any, expected: Expected) -> None:
    stopped = expected.tokens[-1] in EOS
    assert list(answer.token_ids) == list(expected.tokens[:-1] if stopped else expected.tokens)
    assert answer.finish_reason == ("stop" if stopped else "length")
    assert answer.output_tokens == len(expected.tokens)
    assert answer.mean_logprob == pytest.approx(expected.mean_logprob, abs=1e-4)
