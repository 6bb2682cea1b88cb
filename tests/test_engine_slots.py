"""The slots engine against transformers' `generate` on each prompt alone, unpadded."""

import copy
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, Qwen2Config

from pipeline.engine import live, passes
from pipeline.engine.kv import shape_of
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Request
from pipeline.engine.slots import SlotsEngine
from tests.engine_cases import EOS, alone, cases_of, check, request_of
from tests.models import tiny_model, tiny_processor

IMAGES, QUESTIONS = 4, 12
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"seed": 0},
    "Llama, other heads": {
        "seed": 2,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
    },
    "Qwen2": {
        "seed": 0,
        "kind": Qwen2Config,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "Mistral, a window": {
        "seed": 2,
        "kind": MistralConfig,
        "sliding_window": 24,
        "head_dim": 24,
    },
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_processor()


class Known:
    """A model, and what it says to each case alone."""

    def __init__(self, processor: Any, shape: dict[str, Any]) -> None:
        self.processor = processor
        self.model = tiny_model(**shape)
        self.cases = cases_of(IMAGES, QUESTIONS)
        self.expected = [alone(self.model, processor, case) for case in self.cases]

    def engine(self, *, slots: float = 32.0, model: Any = None) -> SlotsEngine:
        """With a budget for about so many prompts."""
        model = copy.deepcopy(self.model) if model is None else model
        shape = shape_of(model.config.get_text_config(), dtype=model.dtype, device=model.device)
        return SlotsEngine(
            model,
            eos_token_ids=EOS,
            table=pixel_table(self.processor),
            kv_budget_bytes=int(slots * 96 * shape.token_bytes),
        )

    def requests(self, groups: Sequence[Sequence[int]]) -> list[Request]:
        return [request_of(self.processor, *(self.cases[i] for i in group)) for group in groups]

    def check(self, engine: SlotsEngine, groups: Sequence[Sequence[int]]) -> None:
        outcomes = engine.submit(self.requests(groups))
        for group, answers in zip(groups, outcomes, strict=True):
            for i, answer in zip(group, answers, strict=True):
                check(answer, self.expected[i])


@pytest.fixture(scope="module", params=SHAPES)
def known(request: pytest.FixtureRequest, processor: Any) -> Known:
    return Known(processor, SHAPES[request.param])


@pytest.fixture(scope="module")
def llama(processor: Any) -> Known:
    return Known(processor, SHAPES["Llama"])


def groups_of(counts: Sequence[int], rng: random.Random) -> list[list[int]]:
    """So many questions about an image each; which ones, and in which order, is drawn."""
    return [
        [image + IMAGES * n for n in rng.sample(range(QUESTIONS), count)]
        for image, count in zip(itertools.cycle(range(IMAGES)), counts)
    ]


@pytest.mark.parametrize("slots", [2, 5, 32])
def test_tokens_and_logprobs_equal_generate_on_each_prompt_alone(known: Known, slots: int) -> None:
    rng = random.Random(slots)
    known.check(known.engine(slots=slots), groups_of([1] * 10, rng))
    known.check(known.engine(slots=slots), groups_of([12, 1, 5, 2, 1, 7, 3], rng))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_an_answer_does_not_depend_on_what_else_is_in_flight(llama: Known, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    slots = data.draw(st.floats(1.5, 32))
    seed = data.draw(st.integers(0, 100))
    llama.check(llama.engine(slots=slots), groups_of(counts, random.Random(seed)))


def test_the_cases_tell_images_positions_and_endings_apart(known: Known) -> None:
    said = [tuple(e.tokens) for e in known.expected]
    assert len(set(said)) > 0.9 * len(said)
    assert {tokens[-1] in EOS for tokens in said} == {True, False}


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = live.Row.next_position.fget
    assert right is not None
    monkeypatch.setattr(live.Row, "next_position", property(lambda row: right(row) + 1))


def unmasked_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        passes, "is_seen", lambda distance, window: torch.ones_like(distance, dtype=torch.bool)
    )


def leaking_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = live._grid

    def wrong(slots: Any, *rest: Any) -> Any:
        grid = right(slots, *rest)
        return passes.Grid(grid.row_of, grid.place_of.roll(1))

    monkeypatch.setattr(live, "_grid", wrong)


def lost_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "joined", lambda a, b: b.out)


def unmoved_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.kv.KVArena.move", lambda *_, **__: None)


@pytest.mark.parametrize(
    "fault", [shifted, unmasked_future, leaking_sibling, lost_prefix, unmoved_keys]
)
def test_the_comparison_finds(
    llama: Known,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        llama.check(llama.engine(slots=6), groups_of([4, 1, 6, 2, 5], random.Random(1)))


def test_calls_from_several_threads_mix_and_get_their_own_answers(llama: Known) -> None:
    engine = llama.engine(slots=4)
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        try:
            llama.check(engine, groups_of([1, 3, 2], random.Random(seed)))
        except BaseException as error:  # noqa: BLE001 (told below)
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
