"""Answers that are held to a JSON schema, of both engines, by a model that knows no JSON."""

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from pipeline.engine.grammar import JsonGrammar, check_schema
from pipeline.engine.noise import noise_key
from pipeline.engine.pixels import pixel_table
from pipeline.engine.plain import PlainEngine
from pipeline.engine.request import Answer, Decoding, Engine, Request
from pipeline.engine.slots import SlotsEngine
from schemas.errors import IncompleteJson, SpecError
from tests.engine_cases import EOS, Case, alone, cases_of, check, mean_logprob, request_of
from tests.models import (
    byte_tokenizer,
    fallback_tokenizer,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)

VOCABULARY = 300
"""Logits of the model: more than its tokenizer has tokens."""
SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue", "none of these"]},
            "count": {"type": "integer", "minimum": 100, "maximum": 9999},
            "is_sure": {"type": "boolean"},
        },
        "required": ["colour", "count", "is_sure"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "things": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "maxLength": 6}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["things"],
        "additionalProperties": False,
    },
    "text": {"type": "string", "minLength": 2, "maxLength": 30},
}
ANSWERS = 200
LONGEST = 48

Made = Callable[[], Engine]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor(tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=VOCABULARY)


@pytest.fixture(scope="module", params=["slots", "plain"])
def made(request: pytest.FixtureRequest, model: Any, processor: Any) -> Made:
    def make() -> Engine:
        table = pixel_table(processor)
        if request.param == "plain":
            return PlainEngine(model, eos_token_ids=EOS, table=table, batch_size=32)
        return SlotsEngine(copy.deepcopy(model), eos_token_ids=EOS, table=table)

    return make


@pytest.fixture(scope="module")
def grammars(processor: Any) -> dict[str, JsonGrammar]:
    return {
        name: JsonGrammar(schema, processor.tokenizer, vocabulary=VOCABULARY, eos=EOS)
        for name, schema in SCHEMAS.items()
    }


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [replace(case, longest=10) for case in cases_of(4, 2)]


def held(processor: Any, case: Case, grammar: JsonGrammar, *, count: int) -> Request:
    """Answers to a case that are drawn, the first of them greedy."""
    request = request_of(processor, case)
    [branch] = request.branches
    warm = Decoding(temperature=1.0, grammar=grammar)
    keys = [noise_key([case.prompt, number]) for number in range(count)]
    branches = [
        replace(branch, max_new_tokens=LONGEST, decoding=warm, noise_key=key) for key in keys
    ]
    branches[0] = replace(branches[0], decoding=replace(warm, temperature=0.0))
    return Request(request.prefix, branches)


@pytest.mark.parametrize("name", SCHEMAS)
def test_all_answers_keep_to_their_schema_or_are_incomplete_and_neighbours_do_not_change(
    made: Made, model: Any, cases: Sequence[Case], grammars: Any, name: str
) -> None:
    processor = tiny_processor(tokenizer=byte_tokenizer())
    engine = made()
    # The plain engine is slower, and chooses by the same code.
    count = (ANSWERS if isinstance(engine, SlotsEngine) else ANSWERS // 5) // len(cases)
    requests = [held(processor, case, grammars[name], count=count) for case in cases]
    mixed = [
        Request(r.prefix, [*r.branches, *request_of(processor, case).branches])
        for r, case in zip(requests, cases, strict=True)
    ]
    complete = []
    for outcomes, case in zip(engine.submit(mixed), cases, strict=True):
        check(outcomes[-1], alone(model, processor, case))
        for outcome in outcomes[:-1]:
            if isinstance(outcome, Answer):
                text = processor.tokenizer.decode(list(outcome.token_ids))
                jsonschema.validate(json.loads(text), SCHEMAS[name])
                complete.append(text.strip())
            else:
                assert isinstance(outcome, IncompleteJson)
                assert f"not complete after {LONGEST} tokens" in str(outcome)
    assert len(complete) > count * len(cases) / 4
    assert len(set(complete)) > len(complete) / 4


def test_a_whole_text_ends_the_answer_and_its_score_is_the_models_own(
    made: Made, model: Any, processor: Any, cases: Sequence[Case], grammars: Any
) -> None:
    [outcomes] = made().submit([held(processor, cases[0], grammars["flat"], count=8)])
    inputs = processor(text=cases[0].prompt, images=cases[0].image, return_tensors="pt")
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    assert answers
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert processor.tokenizer.decode(list(answer.token_ids)).endswith("}")
        assert answer.output_tokens == len(answer.token_ids)
        logprob = mean_logprob(model, inputs, answer.token_ids)
        assert answer.mean_logprob == pytest.approx(logprob, abs=1e-4)


def test_one_that_is_cut_off_is_incomplete(
    made: Made, processor: Any, cases: Sequence[Case], grammars: Any
) -> None:
    request = held(processor, cases[0], grammars["flat"], count=3)
    short = [replace(branch, max_new_tokens=5) for branch in request.branches]
    [outcomes] = made().submit([Request(request.prefix, short)])
    assert {type(outcome) for outcome in outcomes} == {IncompleteJson}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_allowed_leads_to_the_schema(tokenizer: Any, name: str) -> None:
    words = tokenizer()
    size = len(words) + 7
    grammar = JsonGrammar(SCHEMAS[name], words, vocabulary=size, eos=[2])
    rng = random.Random(name)
    for _ in range(10):
        matcher, ids = grammar.matcher(), list[int]()
        while not matcher.is_stopped():
            [bits] = grammar.allowed([matcher])
            allowed = [n for n in range(size) if bits[n // 32] >> (n % 32) & 1]
            ids.append(rng.choice([token for token in allowed if token != 2]))
            assert matcher.consume_token(ids[-1])
        text = words.decode(ids, skip_special_tokens=True)
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objec"}, "Invalid type: objec"),
        ({"type": "string", "not": {"const": "a"}}, r"Unimplemented keys: \[\"not\"\]"),
        ({"type": "string", "format": "zzz"}, "Unknown format: zzz"),
    ],
)
def test_a_schema_that_no_answer_can_be_held_to_is_refused(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SpecError, match=f"json_schema: llguidance cannot hold .*: {reason}"):
        check_schema(schema)


def test_a_tokenizer_that_llguidance_does_not_know_is_refused() -> None:
    with pytest.raises(SpecError, match="llguidance does not know the tokenizer of this model"):
        JsonGrammar({"type": "string"}, tiny_tokenizer(), vocabulary=256, eos=EOS)


def test_without_llguidance_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'lavaflow\[json\]'"):
        check_schema({"type": "string"})
