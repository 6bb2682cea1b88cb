"""Prompts about images for engines, and what `generate` says to each of them alone."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.engine.pixels import pixel_table, resized
from pipeline.engine.plain import PlainEngine
from pipeline.engine.request import GREEDY, Branch, Decoding, Engine, ImagePixels, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from tests.models import noise_image, questions

EOS = (2, 31, 57)
"""31 and 57 are tokens that the random models say often: some answers end with them."""


@dataclass(frozen=True)
class Case:
    """One question about one image, how long the answer may be, and how it is decoded."""

    image: Image.Image
    prompt: str
    longest: int
    decoding: Decoding = GREEDY


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
    pixels = ImagePixels(resized(processor, image), sha256, image.size)
    branches = [
        Branch(tuple(one[last + 1 :]), c.longest, c.decoding)
        for one, c in zip(ids, cases, strict=True)
    ]
    return Request(Prefix(ids[0][: last + 1], [pixels]), branches)


def engine_for(
    kind: str, model: Any, processor: Any, *, room: int = 16, eos: Sequence[int] = EOS
) -> Engine:
    """`slots` or `plain`, with more or less room."""
    table = pixel_table(processor)
    if kind == "plain":
        return PlainEngine(model, eos_token_ids=eos, table=table, batch_size=room)
    own, budget = copy.deepcopy(model), room * 50_000
    return SlotsEngine(own, eos_token_ids=eos, table=table, kv_budget_bytes=budget)


class Counted:
    """How many tokens a slots engine reads, pass by pass; with room for so many of them in one."""

    def __init__(self, engine: SlotsEngine, *, room: int = 10_000) -> None:
        self.passes: list[int] = []
        self.room = room
        self.fails_at_logits = False
        run, logits = engine._language.run, engine._language.logits

        def counted(what: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            if len(embeds) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.passes.append(len(embeds))
            return run(what, embeds, positions)

        def scarce(hidden: torch.Tensor) -> torch.Tensor:
            if self.fails_at_logits and len(hidden) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits(hidden)

        engine._language.run = counted  # type: ignore[method-assign]
        engine._language.logits = scarce  # type: ignore[method-assign]


@dataclass(frozen=True)
class Expected:
    """What `generate` says, the end token included, and why it stops."""

    tokens: Sequence[int]
    mean_logprob: float
    finish_reason: str


def alone(model: Any, processor: Any, case: Case) -> Expected:
    """What `generate` says on this one prompt, unpadded."""
    inputs = processor(text=case.prompt, images=case.image, return_tensors="pt")
    return continued(model, processor, inputs, longest=case.longest, decoding=case.decoding)


def continued(
    model: Any, processor: Any, inputs: Any, *, longest: int, decoding: Decoding = GREEDY
) -> Expected:
    """What `generate` says behind the one prompt of `inputs`."""
    start = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {
        "repetition_penalty": decoding.repetition_penalty,
        "min_new_tokens": decoding.min_new_tokens,
    }
    if decoding.stop is not None:
        options |= {"stop_strings": list(decoding.stop.strings), "tokenizer": processor.tokenizer}
    whole = model.generate(
        **inputs, max_new_tokens=longest, do_sample=False, eos_token_id=list(EOS), **options
    )
    said = whole[0, start:].tolist()
    is_cut = len(said) < longest or said[-1] in EOS
    logprob = mean_logprob(model, inputs, said)
    return Expected(said, logprob, "stop" if is_cut else "length")


def mean_logprob(model: Any, inputs: Any, said: Sequence[int]) -> float:
    """Of the tokens behind a prompt, teacher-forced."""
    start = inputs["input_ids"].shape[1]
    whole = torch.cat([inputs["input_ids"], torch.tensor([list(said)])], -1)
    forced = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    with torch.inference_mode():
        logits = model(**forced).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, whole[0, start:, None]).mean().item()


def check(answer: Any, expected: Expected) -> None:
    has_end = expected.tokens[-1] in EOS
    assert list(answer.token_ids) == list(expected.tokens[:-1] if has_end else expected.tokens)
    assert answer.finish_reason == expected.finish_reason
    assert answer.output_tokens == len(expected.tokens)
    assert answer.mean_logprob == pytest.approx(expected.mean_logprob, abs=1e-4)
