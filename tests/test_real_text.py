"""Text that was really learned goes through loading and both engines unharmed."""

import itertools
from typing import Any

import pytest
import torch

from pipeline.engine.check import check_model
from pipeline.engine.load import end_tokens, load_model, load_processor
from pipeline.engine.request import Branch, Prefix, Request
from schemas.job import ModelSpec
from tests.engine_cases import engine_for
from tests.smollm import smollm_checkpoint

pytestmark = pytest.mark.slow

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy? Answer in one word.": "Rome",
    "Is the sky blue?": "blue",
    "Which colour do you get when you mix blue and yellow paint, and what is two plus two?": "",
}
LONGEST = 16


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    spec = ModelSpec(path=str(smollm_checkpoint()), dtype="float32", device="cpu")
    check_model(spec)
    return load_model(spec, torch.device("cpu")), load_processor(spec)


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """The ids of each question, and what `generate` says to it alone."""
    model, processor = loaded
    ids = {question: prompt_ids(processor, question) for question in QUESTIONS}
    return {question: (each, alone(model, each)) for question, each in ids.items()}


def prompt_ids(processor: Any, question: str) -> list[int]:
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = processor.tokenizer(text)["input_ids"]
    return ids


def alone(model: Any, ids: list[int]) -> list[int]:
    whole = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=LONGEST,
        do_sample=False,
    )
    said: list[int] = whole[0, len(ids) :].tolist()
    return said


@pytest.mark.parametrize("kind", ["plain", "slots"])
def test_text_turns_are_answered_sensibly_and_packed_as_alone(
    loaded: tuple[Any, Any], asked: dict[str, tuple[list[int], list[int]]], kind: str
) -> None:
    model, processor = loaded
    ends = end_tokens(model, processor)
    prompts = [ids for ids, _ in asked.values()]
    shared = min(
        next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        for one, other in itertools.combinations(prompts, 2)
    )
    assert shared > 10
    branches = [Branch(ids[shared:], LONGEST) for ids in prompts]
    packed = Request(Prefix(prompts[0][:shared]), branches)
    single = [Request(Prefix([]), [Branch(ids, LONGEST)]) for ids in prompts]
    engine = engine_for(kind, model, processor, room=4000, eos=ends)
    [together], *apart = engine.submit([packed]), *engine.submit(single)
    for (question, word), one, [other] in zip(QUESTIONS.items(), together, apart, strict=True):
        wanted = [token for token in asked[question][1] if token not in ends]
        assert list(one.token_ids) == wanted
        assert list(other.token_ids) == wanted
        assert word in processor.tokenizer.decode(one.token_ids)


def test_a_sentence_goes_on_as_it_should(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    ids = processor.tokenizer("The capital of France is")["input_ids"]
    engine = engine_for("slots", model, processor, room=4000, eos=end_tokens(model, processor))
    [[answer]] = engine.submit([Request(Prefix([]), [Branch(ids, 2)])])
    assert processor.tokenizer.decode(answer.token_ids).startswith(" Paris")
