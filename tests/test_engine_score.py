"""Answers that are given, scored by both engines, against transformers on one at a time."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from pipeline.engine import score
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, Engine, Request, Score
from pipeline.engine.slots import SlotsEngine
from schemas.errors import DeviceOutOfMemory, NonFiniteLogits
from tests.engine_cases import (
    EOS,
    Case,
    Counted,
    alone,
    cases_of,
    check,
    engine_for,
    request_of,
)
from tests.models import tiny_model, tiny_processor

GIVEN = [(40,), (41, 90, 17), (57, 3), (200, 201, 202, 203, 204)]
"""Answers, by their tokens; one begins with an end token, which does not end it here."""

Made = Callable[..., Engine]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module", params=["slots", "plain"])
def made(request: pytest.FixtureRequest, model: Any, processor: Any) -> Made:
    return functools.partial(engine_for, request.param, processor=processor, model=model)


@dataclass(frozen=True)
class Known:
    """A question, and what transformers thinks of each of GIVEN behind it: without an end, and of
    an end behind that."""

    case: Case
    logprobs: Sequence[float]
    ends: Sequence[float]


def known(model: Any, processor: Any, case: Case) -> Known:
    inputs = processor(text=case.prompt, images=case.image, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    logprobs, ends = [], []
    for tokens in GIVEN:
        whole = torch.cat([inputs["input_ids"], torch.tensor([tokens])], -1)
        forced = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        with torch.inference_mode():
            found = model(**forced).logits[0, start - 1 :].log_softmax(-1)
        logprobs.append(sum(found[n, token].item() for n, token in enumerate(tokens)))
        ends.append(found[len(tokens), list(EOS)].exp().sum().log().item())
    return Known(case, logprobs, ends)


@pytest.fixture(scope="module")
def cases(model: Any, processor: Any) -> list[Known]:
    return [known(model, processor, case) for case in cases_of(3, 4)]


def scored(request: Request) -> list[Branch]:
    """Each answer behind each question of a request."""
    return [
        Branch((*branch.token_ids, *tokens), 1, scored=len(tokens))
        for branch in request.branches
        for tokens in GIVEN
    ]


def check_scores(outcomes: Sequence[Any], known: Known, *, has_end: bool = True) -> None:
    for outcome, tokens, logprob, end in zip(
        outcomes, GIVEN, known.logprobs, known.ends, strict=True
    ):
        assert isinstance(outcome, Score)
        assert outcome.logprob == pytest.approx(logprob + end * has_end, abs=1e-4)
        assert outcome.output_tokens == len(tokens) + has_end


@pytest.mark.parametrize("room", [2, 5, 64])
def test_scores_are_those_of_transformers_one_at_a_time(
    made: Made, processor: Any, cases: Sequence[Known], room: int
) -> None:
    order = random.Random(room).sample(range(len(cases)), len(cases))
    requests = []
    for i in order:
        request = request_of(processor, cases[i].case)
        requests.append(Request(request.prefix, scored(request)))
    for i, outcomes in zip(order, made(room=room).submit(requests), strict=True):
        check_scores(outcomes, cases[i])


def test_scores_and_answers_of_one_image_stand_beside_each_other(
    made: Made, model: Any, processor: Any, cases: Sequence[Known]
) -> None:
    of_image = cases[::3]
    request = request_of(processor, *(each.case for each in of_image))
    mixed = [
        branch
        for pair in itertools.zip_longest(scored(request), request.branches)
        for branch in pair
        if branch is not None
    ]
    [outcomes] = made().submit([Request(request.prefix, mixed)])
    scores = [o for o, b in zip(outcomes, mixed, strict=True) if b.scored]
    answers = [o for o, b in zip(outcomes, mixed, strict=True) if not b.scored]
    for number, each in enumerate(of_image):
        check_scores(scores[len(GIVEN) * number :][: len(GIVEN)], each)
    for answer, each in zip(answers, of_image, strict=True):
        check(answer, alone(model, processor, each.case))


def test_the_prompt_is_counted_without_the_answer(
    made: Made, processor: Any, cases: Sequence[Known]
) -> None:
    request = request_of(processor, cases[0].case)
    prompt = len(request.prefix.token_ids) + len(request.branches[0].token_ids)
    [outcomes] = made().submit([Request(request.prefix, scored(request))])
    assert [outcome.prompt_tokens for outcome in outcomes] == [prompt] * len(GIVEN)


def test_a_model_without_end_tokens_scores_the_answers_alone(
    made: Made, processor: Any, cases: Sequence[Known]
) -> None:
    request = request_of(processor, cases[0].case)
    [outcomes] = made(eos=()).submit([Request(request.prefix, scored(request))])
    check_scores(outcomes, cases[0], has_end=False)


def test_logits_are_made_for_some_places_at_a_time(
    made: Made, processor: Any, cases: Sequence[Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "PLACES", 3)
    request = request_of(processor, cases[0].case)
    [outcomes] = made().submit([Request(request.prefix, scored(request))])
    check_scores(outcomes, cases[0])


def test_logits_that_are_not_finite_fail_their_own(
    made: Made, model: Any, processor: Any, cases: Sequence[Known]
) -> None:
    broken, unused = copy.deepcopy(model), 250
    with torch.no_grad():
        broken.get_input_embeddings().weight[unused] = float("nan")
    request = request_of(processor, cases[0].case)
    ids = (*request.branches[0].token_ids, unused, 40)
    branches = [Branch(ids, 1, scored=2), *scored(request)]
    [[guilty, *others]] = made(model=broken).submit([Request(request.prefix, branches)])
    assert isinstance(guilty, NonFiniteLogits)
    check_scores(others, cases[0])


# Of slots alone


def slots_engine(model: Any, processor: Any) -> SlotsEngine:
    return SlotsEngine(copy.deepcopy(model), eos_token_ids=EOS, table=pixel_table(processor))


def test_all_answers_to_all_questions_of_an_image_are_read_with_one_prefix_and_no_step(
    model: Any, processor: Any, cases: Sequence[Known]
) -> None:
    engine = slots_engine(model, processor)
    counted = Counted(engine)
    request = request_of(processor, *(each.case for each in cases[::3]))
    branches = scored(request)
    engine.submit([Request(request.prefix, branches)])
    own = sum(len(branch.token_ids) for branch in branches)
    assert sum(counted.passes) == len(request.prefix.token_ids) + own


def test_what_does_not_fit_is_halved_and_scores_stay_the_same(
    model: Any, processor: Any, cases: Sequence[Known]
) -> None:
    engine = slots_engine(model, processor)
    counted = Counted(engine, room=70)
    requests = [request_of(processor, each.case) for each in cases]
    asked = [Request(request.prefix, scored(request)) for request in requests]
    for outcomes, each in zip(engine.submit(asked), cases, strict=True):
        check_scores(outcomes, each)
    assert max(counted.passes) <= 70


@pytest.mark.parametrize("is_scored", [True, False])
def test_memory_that_runs_out_at_the_logits_takes_nothing_in_twice(
    model: Any, processor: Any, cases: Sequence[Known], is_scored: bool
) -> None:
    engine = slots_engine(model, processor)
    Counted(engine).fails_at_logits = True
    request = request_of(processor, *(each.case for each in cases[::3]))
    if is_scored:
        one_token = [b for b in scored(request) if b.scored == 1]
        [outcomes] = engine.submit([Request(request.prefix, [*one_token, *scored(request)[1:2]])])
        *fit, large = outcomes
        assert {type(outcome) for outcome in fit} == {Score}
        assert isinstance(large, DeviceOutOfMemory)
    else:
        for answer, each in zip(engine.submit([request])[0], cases[::3], strict=True):
            assert isinstance(answer, Answer)
            check(answer, alone(model, processor, each.case))
    assert engine._live is not None
    assert not engine._live.rows
    assert not engine._live.jobs


def test_a_scored_branch_is_not_one_that_is_asked(cases: Sequence[Known]) -> None:
    branch = Branch((1, 2), 1)
    assert branch != replace(branch, scored=1)
