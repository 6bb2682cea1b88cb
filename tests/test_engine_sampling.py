"""Answers that are more than greedy, of both engines, against transformers."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.engine import said, sampling
from pipeline.engine.noise import Noise, noise_key
from pipeline.engine.pixels import pixel_table
from pipeline.engine.plain import PlainEngine
from pipeline.engine.request import Answer, Branch, Decoding, Engine, Request
from pipeline.engine.slots import SlotsEngine
from pipeline.engine.stops import StopStrings
from schemas.errors import SpecError
from tests.engine_cases import (
    EOS,
    Case,
    alone,
    cases_of,
    check,
    engine_for,
    mean_logprob,
    request_of,
)
from tests.models import tiny_model, tiny_processor

DRAWS = 10_000
LEAST_LIKELY = 0.001
"""A statistic that is less likely than this, if the draws are right, fails the test."""
WARM = Decoding(temperature=0.8, top_k=40, top_p=0.9)

Made = Callable[..., Engine]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module", params=["slots", "plain"])
def made(request: pytest.FixtureRequest, model: Any, processor: Any) -> Made:
    """An engine with more or less room."""

    return functools.partial(engine_for, request.param, model, processor)


# Greedy with settings


@pytest.fixture(scope="module")
def settings(processor: Any) -> list[Decoding]:
    """Of each kind; the stop strings are such that the model says some of them."""
    stops = [StopStrings(strings, processor.tokenizer) for strings in (["e"], ["th", " a", "is"])]
    return [
        Decoding(),
        Decoding(repetition_penalty=1.3),
        Decoding(repetition_penalty=0.8),
        Decoding(min_new_tokens=5),
        Decoding(stop=stops[0]),
        Decoding(stop=stops[1], repetition_penalty=1.2, min_new_tokens=4),
    ]


@pytest.fixture(scope="module")
def cases(settings: Sequence[Decoding]) -> list[Case]:
    """All settings with all images, beside each other."""
    return [
        replace(case, decoding=settings[i % len(settings)], longest=8 + i % 5)
        for i, case in enumerate(cases_of(4, 18))
    ]


@pytest.fixture(scope="module")
def expected(model: Any, processor: Any, cases: Sequence[Case]) -> Any:
    return [alone(model, processor, case) for case in cases]


def test_greedy_answers_with_all_settings_are_those_of_generate(
    made: Made, processor: Any, cases: Sequence[Case], expected: Any
) -> None:
    groups = [list(range(i, len(cases), 4)) for i in range(4)]
    requests = [request_of(processor, *(cases[i] for i in group)) for group in groups]
    outcomes = made().submit(requests)
    for group, answers in zip(groups, outcomes, strict=True):
        for i, answer in zip(group, answers, strict=True):
            check(answer, expected[i])


def test_every_setting_changes_answers(
    model: Any, processor: Any, cases: Sequence[Case], expected: Any, settings: Any
) -> None:
    for setting in settings[1:]:
        of_it = [i for i, case in enumerate(cases) if case.decoding == setting]
        plain = [alone(model, processor, replace(cases[i], decoding=Decoding())) for i in of_it]
        assert [expected[i].tokens for i in of_it] != [each.tokens for each in plain]
    stopped = [e for e, c in zip(expected, cases, strict=True) if c.decoding.stop]
    assert {(e.finish_reason, e.tokens[-1] in EOS) for e in stopped} == {
        ("stop", True),
        ("stop", False),
        ("length", False),
    }


def test_a_stop_string_that_no_token_can_end_is_refused(processor: Any) -> None:
    with pytest.raises(
        SpecError, match=r"stop: \['日本'\] cannot be found in .* unable to identify tokens"
    ):
        StopStrings(["日本"], processor.tokenizer)


# Drawn


def drawn_request(processor: Any, case: Case, *, n: int, decoding: Decoding = WARM) -> Request:
    """`n` samples of the case, by the keys of its prompt."""
    request = request_of(processor, case)
    [branch] = request.branches
    keys = [noise_key([case.prompt, number]) for number in range(n)]
    branches = [replace(branch, decoding=decoding, noise_key=key) for key in keys]
    return Request(request.prefix, branches)


def said_of(outcomes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    assert all(isinstance(outcome, Answer) for outcome in itertools.chain(*outcomes))
    return [tuple(outcome.token_ids) for outcome in itertools.chain(*outcomes)]


@pytest.fixture(scope="module")
def drawn_cases() -> list[Case]:
    return [replace(case, longest=12) for case in cases_of(4, 3)]


@pytest.fixture(scope="module")
def drawn_alone(model: Any, processor: Any, drawn_cases: Sequence[Case]) -> Any:
    """Five samples of each case, one answer at a time."""
    engine = PlainEngine(model, eos_token_ids=EOS, table=pixel_table(processor), batch_size=1)
    requests = [drawn_request(processor, case, n=5) for case in drawn_cases]
    return [said_of(engine.submit([request])) for request in requests]


@pytest.mark.parametrize("room", [2, 7, 64])
def test_samples_do_not_depend_on_the_batch_the_room_or_the_order(
    made: Made, processor: Any, drawn_cases: Sequence[Case], drawn_alone: Any, room: int
) -> None:
    order = random.Random(room).sample(range(len(drawn_cases)), len(drawn_cases))
    requests = [drawn_request(processor, drawn_cases[i], n=5) for i in order]
    greedy = request_of(processor, drawn_cases[0])
    outcomes = made(room=room).submit([greedy, *requests])
    for i, found in zip(order, outcomes[1:], strict=True):
        assert said_of([found]) == drawn_alone[i]


def test_samples_of_one_question_differ(drawn_alone: Any) -> None:
    assert all(len(set(samples)) > 3 for samples in drawn_alone)


def test_mean_logprob_of_what_is_drawn_is_the_models_at_temperature_1(
    made: Made, model: Any, processor: Any, drawn_cases: Sequence[Case]
) -> None:
    penalised = replace(WARM, repetition_penalty=1.3, min_new_tokens=3)
    for case in drawn_cases[:3]:
        request = drawn_request(processor, case, n=3, decoding=penalised)
        inputs = processor(text=case.prompt, images=case.image, return_tensors="pt")
        for answer in made().submit([request])[0]:
            assert isinstance(answer, Answer)
            tokens = list(answer.token_ids)
            if answer.output_tokens > len(tokens):
                ends = [mean_logprob(model, inputs, [*tokens, end]) for end in EOS]
                assert any(answer.mean_logprob == pytest.approx(e, abs=1e-4) for e in ends)
            else:
                logprob = mean_logprob(model, inputs, tokens)
                assert answer.mean_logprob == pytest.approx(logprob, abs=1e-4)


def chi_squared(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How likely counts at least as far from the probabilities are. Rare events are one."""
    expected = probs.double() * counts.sum()
    is_rare = expected < 5
    kept = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    found = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]]).double()
    found, kept = found[kept > 0], kept[kept > 0]
    statistic = ((found - kept) ** 2 / kept).sum()
    return torch.special.gammaincc(torch.tensor((len(kept) - 1) / 2.0), statistic / 2).item()


DISTRIBUTIONS = {
    "temperature": Decoding(temperature=0.7),
    "top_k": Decoding(temperature=1.0, top_k=10),
    "top_p": Decoding(temperature=1.5, top_p=0.8),
    "all": Decoding(temperature=1.3, top_k=30, top_p=0.9, repetition_penalty=1.4, min_new_tokens=1),
}


def first_tokens(engine: Engine, request: Request) -> torch.Tensor:
    """How often each token is drawn; of end tokens, one stands for all."""
    prefix, ids = request.prefix, list(request.branches[0].token_ids)
    prefix = replace(prefix, token_ids=[*prefix.token_ids, *ids[:-1]])
    request = Request(prefix, [replace(b, token_ids=ids[-1:]) for b in request.branches])
    tokens = [next(iter(ids), EOS[0]) for ids in said_of(engine.submit([request]))]
    return torch.bincount(torch.tensor(tokens), minlength=256)


def of_sampler(model: Any, processor: Any, case: Case, decoding: Decoding) -> torch.Tensor:
    """What transformers' sampler draws the first token from."""
    inputs = processor(text=case.prompt, images=case.image, return_tensors="pt")
    out = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=1,
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        repetition_penalty=decoding.repetition_penalty,
        min_new_tokens=decoding.min_new_tokens,
        eos_token_id=list(EOS),
        return_dict_in_generate=True,
        output_scores=True,
    )
    probs: torch.Tensor = out.scores[0][0].softmax(-1)
    ends = probs[list(EOS)].sum()
    probs[list(EOS)] = 0.0
    probs[EOS[0]] = ends
    return probs


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_are_distributed_as_transformers_sampler_draws(
    model: Any, processor: Any, drawn_cases: Sequence[Case], name: str
) -> None:
    decoding, case = DISTRIBUTIONS[name], replace(drawn_cases[0], longest=1)
    probs = of_sampler(model, processor, case, decoding)
    engine = SlotsEngine(copy.deepcopy(model), eos_token_ids=EOS, table=pixel_table(processor))
    counts = first_tokens(engine, drawn_request(processor, case, n=DRAWS, decoding=decoding))
    assert (probs > 0).sum() > 5
    assert not counts[probs == 0].any()
    assert chi_squared(counts, probs) > LEAST_LIKELY


def test_the_statistic_tells_a_distribution_that_is_a_little_off(
    model: Any, processor: Any, drawn_cases: Sequence[Case]
) -> None:
    near, far = (Decoding(temperature=t) for t in (0.7, 0.75))
    probs = [of_sampler(model, processor, drawn_cases[0], decoding) for decoding in (near, far)]
    uniforms = torch.tensor([Noise(noise_key([n]))[0] for n in range(DRAWS)], dtype=torch.float64)
    tokens = sampling.drawn(probs[0].log().expand(DRAWS, -1), uniforms)
    counts = torch.bincount(tokens, minlength=256)
    assert chi_squared(counts, probs[0]) > LEAST_LIKELY > chi_squared(counts, probs[1])


def test_numbers_of_one_key_are_even_and_know_nothing_of_each_other() -> None:
    noise = Noise(noise_key(["one"]))
    numbers = torch.tensor([noise[n] for n in range(DRAWS)], dtype=torch.float64)
    pairs = (numbers[:-1] * 10).long() * 10 + (numbers[1:] * 10).long()
    even = torch.full((100,), 0.01)
    assert chi_squared(torch.bincount(pairs, minlength=100), even) > LEAST_LIKELY
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_what_chance_gives_never_changes() -> None:
    """An answer that is drawn again by another version of anything has to be the same."""
    key = noise_key([7, "s3://bucket/a.tar", 3, "caption", 0, 1])
    assert f"{key:032x}" == "656992822115554d24988160036090d4"
    assert [Noise(key)[n] for n in (0, 1, 40)] == [
        0.4747006454389975,
        0.18181827350002333,
        0.3293351154347103,
    ]


def test_a_number_can_be_asked_for_again_and_out_of_order() -> None:
    a, b = Noise(5), Noise(5)
    assert [a[100], a[3], a[3]] == [b[n] for n in (100, 3, 3)]
    assert a[0] != Noise(6)[0]


# The comparison


def wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.Chooser, "_made", lambda *_: lambda _, scores: scores)


def shifted_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    right = said.Said.uniform.fget
    assert right is not None
    monkeypatch.setattr(
        said.Said, "uniform", property(lambda own: (right(own) + 0.1 * next(numbers)) % 1.0)
    )


@pytest.mark.parametrize("fault", [wrong_order, shifted_noise])
def test_the_comparison_of_samples_finds(
    made: Made,
    drawn_cases: Sequence[Case],
    drawn_alone: Any,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    requests = [drawn_request(tiny_processor(), case, n=5) for case in drawn_cases]
    outcomes = made().submit(requests)
    assert [said_of([found]) for found in outcomes] != drawn_alone


def test_a_branch_that_is_drawn_is_not_greedy() -> None:
    assert Branch((1,), 5) != Branch((1,), 5, WARM)
