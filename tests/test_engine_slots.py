"""The slots engine against transformers' `generate` on each prompt alone, unpadded."""

import copy
import gc
import itertools
import random
import shutil
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from pipeline.engine import live, look, prefill, slots, step, stepper
from pipeline.engine.attention import Asked
from pipeline.engine.picking import Picking
from pipeline.engine.replays import Replays, Run
from pipeline.engine.request import Answer, Branch, ImagePixels, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from pipeline.engine.traced import TracedStep
from schemas.errors import (
    SpecError,
)
from tests.engine_cases import EOS
from tests.flash import stand_in
from tests.slots_cases import IMAGES, SHAPES, Known, groups_of, known_of
from tests.turns import Asking, talk

FLASH = "flash_attention_2"


@pytest.fixture(scope="module", params=SHAPES)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


@pytest.fixture(scope="module")
def llama() -> Known:
    return known_of("Llama")


@pytest.mark.parametrize("slots", [2, 5, 32])
def test_tokens_and_logprobs_equal_generate_on_each_prompt_alone(known: Known, slots: int) -> None:
    rng = random.Random(slots)
    known.check(known.engine(slots=slots), groups_of([1] * 10, rng))
    known.check(known.engine(slots=slots), groups_of([12, 1, 5, 2, 1, 7, 3], rng))


def test_questions_of_several_blocks_give_the_same(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "BLOCK_TOKENS", 3)
    known.check(known.engine(slots=8), groups_of([6, 1, 3, 1, 2], random.Random(1)))


def test_steps_as_they_are_compiled_give_the_same(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they run as they stand, so that this takes no compiler."""
    widths = []
    attend = TracedStep.attend

    def counted(step: TracedStep, asked: Asked) -> torch.Tensor:
        widths.append(asked.query.shape[1])
        return attend(step, asked)

    monkeypatch.setattr(TracedStep, "attend", counted)
    engine = known.engine(slots=5)
    engine._language._compiled_step = engine._language._text.forward
    known.check(engine, groups_of([1] * 10, random.Random(0)))
    assert len(set(widths)) > 1


def test_the_last_row_is_read_by_what_is_compiled_for_several(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, at_work = [], []
    attend = TracedStep.attend

    def counted(step: TracedStep, asked: Asked) -> torch.Tensor:
        read.append(asked.query.shape[1])
        return attend(step, asked)

    monkeypatch.setattr(TracedStep, "attend", counted)
    engine = llama.engine()
    engine._language._compiled_step = engine._language._text.forward
    step = engine._stepper.run

    def run(live: live.Live, rows: Sequence[live.Row]) -> torch.Tensor:
        at_work.append(len(rows))
        return step(live, rows)

    engine._stepper.run = run  # type: ignore[method-assign]
    llama.check(engine, groups_of([1] * 7, random.Random(1)))
    assert min(at_work) == 1
    assert min(read) == 2


def test_attention_by_matrix_products_gives_the_same(known: Known) -> None:
    groups = groups_of([6, 1, 3, 1, 2], random.Random(0))
    known.check(known.engine(slots=8, attention="eager"), groups)


@pytest.mark.parametrize("slots", [3, 32])
def test_a_kernel_that_takes_lengths_and_no_masks_gives_the_same(
    known: Known, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch)
    engine = known.engine(slots=slots, attention=FLASH)
    for counts in ([1] * 6, [6, 1, 3, 1, 2]):
        known.check(engine, groups_of(counts, random.Random(slots)))
    assert calls["causal"]
    has_windows = "sliding_window" in known.shape
    assert bool(calls["lengths"]) is not has_windows


@pytest.mark.parametrize("slots", [2, 5, 32])
def test_steps_that_are_done_again_as_recorded_give_the_same(known: Known, slots: int) -> None:
    """As CUDA graphs have it: nothing differs between steps of one outline but their numbers."""
    engine, recorded = known.engine(slots=slots), Counter[str]()

    def record(run: Run) -> Run:
        recorded["steps"] += 1

        def again() -> torch.Tensor:
            recorded["again"] += 1
            return run()

        return again

    engine._stepper.replays = Replays(record)
    for counts in ([1] * 10, [12, 1, 5, 2, 1, 7, 3], [1] * 3):
        known.check(engine, groups_of(counts, random.Random(slots)))
    assert recorded["again"] > recorded["steps"]


def turns_of(engine: SlotsEngine, requests: Sequence[Request]) -> list[Any]:
    """What is said in conversations about the images of requests."""
    askings = [Asking(each, [talk(random.Random(n), 3) for n in range(3)]) for each in requests]
    outcomes = engine.submit([asking.request for asking in askings])
    return [[each.token_ids for each in of_image] for of_image in outcomes]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++, which is not here")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_compiled_text_model_gives_the_same(llama: Known) -> None:
    """Compiled for two threads; its steps take one."""
    compiled = counters["stats"]["unique_graphs"]
    engine = llama.engine(slots=5, compiled=True)
    assert engine._language.threads.most_rows
    llama.check(engine, groups_of([6, 1, 3, 1, 2], random.Random(0)))
    llama.check(engine, groups_of([1] * 7, random.Random(1)))
    llama.check(engine, groups_of([1], random.Random(2)))
    said = [turns_of(each, llama.requests([[0], [1, 5]])) for each in (engine, llama.engine())]
    assert said[0] == said[1]
    assert counters["stats"]["unique_graphs"] == compiled + 5, "a number of tokens was compiled"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_model_that_cannot_be_compiled_here_is_said_at_once(llama: Known) -> None:
    without = {"cpp.cxx": (None, "/nowhere/c++"), "force_disable_caches": True}
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(without),
        pytest.raises(SpecError, match=r"resources\.generate\.compile.*/nowhere/c\+\+.*false"),
    ):
        llama.engine(slots=5, compiled=True)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_an_answer_does_not_depend_on_what_else_is_in_flight(known: Known, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    engine = known.engine(slots=data.draw(st.floats(1.5, 32)))
    groups = groups_of(counts, random.Random(data.draw(st.integers(0, 100))))
    of_a_call = data.draw(st.sampled_from([1, 3, 16]))
    for start in range(0, len(groups), of_a_call):
        known.check(engine, groups[start : start + of_a_call])


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 1, 5], [1]])
def test_the_last_layer_has_no_more_tokens_than_are_asked_for(
    known: Known, counts: Sequence[int]
) -> None:
    engine, tokens = known.engine(), Counter[int]()

    def count(number: int, _: Any, arguments: Any) -> None:
        tokens[number] += arguments[0].shape[1]

    layers = engine._language._text.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(partial(count, number))
    outcomes = engine.submit(known.requests(groups_of(counts, random.Random(0))))
    said = sum(answer.output_tokens for answers in outcomes for answer in answers)
    assert tokens[len(layers) - 1] == said
    assert tokens[0] > 4 * said


def test_a_single_question_is_read_by_what_is_compiled(llama: Known) -> None:
    engine, lengths = llama.engine(), []
    text = engine._language._text

    def compiled(**arguments: Any) -> Any:
        lengths.append(arguments["inputs_embeds"].shape[1])
        return text(**arguments)

    engine._language._compiled = compiled
    llama.check(engine, groups_of([1], random.Random(0)))
    assert len(lengths) == 1


def test_the_cases_tell_images_positions_and_endings_apart(known: Known) -> None:
    said = [tuple(e.tokens) for e in known.expected]
    assert len(set(said)) > 0.9 * len(said)
    assert {tokens[-1] in EOS for tokens in said} == {True, False}


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = live.Row.next_position.fget
    assert right is not None
    monkeypatch.setattr(live.Row, "next_position", property(lambda row: right(row) + 1))


def unmasked_future(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(distance: torch.Tensor, window: int | None) -> torch.Tensor:
        return torch.ones_like(distance, dtype=torch.bool)

    monkeypatch.setattr(prefill, "is_seen", seen)


def unmasked_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(distance: torch.Tensor, window: int | None) -> torch.Tensor:
        return torch.ones_like(distance, dtype=torch.bool)

    monkeypatch.setattr(step, "is_seen", seen)


def leaking_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stepper.tables_of

    def wrong(*args: Any, **options: Any) -> Any:
        table, place_of = right(*args, **options)
        return table, np.roll(place_of, 1)

    monkeypatch.setattr(stepper, "tables_of", wrong)


def lost_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_only(kernels: Any, _: Any, at_prefix: Any, own: Any, at_own: Any, **__: Any) -> Any:
        return kernels.taken(own, at_own)

    monkeypatch.setattr("pipeline.engine.kernels.Kernels.join", own_only)


def unmoved_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.kv.KVArena.move", lambda *_, **__: None)


@pytest.mark.parametrize(
    "fault",
    [shifted, unmasked_future, unmasked_padding, leaking_sibling, lost_prefix, unmoved_keys],
)
def test_the_comparison_finds(
    llama: Known,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        llama.check(llama.engine(slots=6), groups_of([4, 1, 6, 2, 5], random.Random(1)))


LEAVING = """
import threading, time
from dataclasses import replace
from tests.engine_cases import cases_of, engine_for, request_of
from tests.models import tiny_model, tiny_processor

processor = tiny_processor()
engine = engine_for("slots", tiny_model(), processor)
request = request_of(processor, *(replace(case, longest=300) for case in cases_of(1, 8)))
asking = lambda: [engine.submit([request]) for _ in range(1000)]
threading.Thread(target=asking, daemon=True).start()
time.sleep(0.5)
"""


def test_a_program_that_ends_while_the_engine_is_at_work_ends_in_order() -> None:
    """Not aborted by C++, as one is whose daemon thread is inside torch."""
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_an_image_that_is_wanted_while_another_caller_lets_it_go_stays_wanted(
    llama: Known,
) -> None:
    looker, prefix = llama.engine()._looker, llama.requests([[0]])[0].prefix
    wanting = threading.Thread(target=looker.want, args=(prefix,))

    class Slow(Counter[str]):
        """Deletes when somebody else has had the time to want."""

        def __delitem__(self, key: str) -> None:
            wanting.start()
            wanting.join(0.2)
            super().__delitem__(key)

    looker._wanted = Slow()
    looker.want(prefix)
    looker.let_go(prefix)
    wanting.join()
    assert list(looker._wanted.values()) == [1]


def test_an_image_is_looked_at_once_while_anybody_waits_for_it(llama: Known) -> None:
    engine = llama.engine()
    right, seen = engine._looker._looked, []

    def looked(images: Sequence[ImagePixels]) -> Any:
        seen.extend(images)
        return right(images)

    engine._looker._looked = looked  # type: ignore[method-assign]
    llama.check(engine, [[i] for i in range(16)])
    assert len(seen) == IMAGES
    assert not engine._looker._seen


def test_prompts_are_read_in_passes_of_one_size(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are needed, none of them smaller than the others by more than a prompt."""
    [request] = llama.requests([[0]])
    prompt = len(request.prefix.token_ids) + len(request.branches[0].token_ids)
    monkeypatch.setattr(slots, "CPU_PREFILL_TOKENS", 8 * prompt)
    engine = llama.engine()
    right, passes = engine._language.run, []

    def run(what: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if isinstance(what, prefill.Prefill):
            passes.append(len(positions))
        return right(what, embeds, positions)

    engine._language.run = run  # type: ignore[method-assign]
    llama.check(engine, [[0]] * 17)
    assert sorted(passes) == [5 * prompt, 6 * prompt, 6 * prompt]


def test_turns_that_fall_due_together_are_read_together(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = []

    class Watched(Picking):
        def __init__(self, live: live.Live, *, most_tokens: int) -> None:
            due.append(len(live.continuing))
            super().__init__(live, most_tokens=most_tokens)
            assert not live.continuing

    monkeypatch.setattr(slots, "Picking", Watched)
    turns_of(llama.engine(), llama.requests([[image] for image in range(IMAGES)]))
    assert max(due) > 1


def test_images_are_looked_at_in_rounds_of_one_size() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    images = [ImagePixels(pixels, str(n)) for n in range(35)]
    rounds = list(look.alike(images))
    assert [len(each) for each in rounds] == [11, 12, 12]
    assert [image for each in rounds for image in each] == images


def test_layers_behind_the_one_that_is_read_do_not_run(llama: Known) -> None:
    model = copy.deepcopy(llama.model)
    layers = list(model.model.vision_tower.encoder.layers)
    engine = llama.engine(model=model)
    layers[-1].forward = None
    llama.check(engine, [[0], [1]])


def test_prompts_without_an_image_are_answered(llama: Known) -> None:
    ids = llama.processor.tokenizer("USER: yes or no? ASSISTANT:")["input_ids"]
    engine = llama.engine()
    outcomes = engine.submit(
        [Request(Prefix([]), [Branch(ids, 4)]), Request(Prefix(ids[:3]), [Branch(ids[3:], 4)] * 2)]
    )
    outcomes += llama.engine().submit([Request(Prefix([]), [Branch(ids, 4)] * 3)])
    whole = llama.model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=list(EOS)
    )
    expected = [token for token in whole[0, len(ids) :].tolist() if token not in EOS]
    for answer in itertools.chain(*outcomes):
        assert isinstance(answer, Answer)
        assert list(answer.token_ids) == expected


def test_an_engine_that_nobody_asks_any_more_is_freed(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "LINGER_S", 0.05)
    engine = llama.engine()
    llama.check(engine, [[0], [1, 5]])
    thread = engine._thread
    assert thread
    thread.join(timeout=30)
    llama.check(engine, [[0], [1, 5]])
    again, freed = engine._thread, weakref.ref(engine)
    assert again
    del engine
    again.join(timeout=30)
    del thread, again
    gc.collect()
    assert freed() is None


def test_requests_without_branches_and_empty_calls_give_nothing(llama: Known) -> None:
    engine = llama.engine()
    assert engine.submit([]) == []
    assert engine.submit([Request(llama.requests([[0]])[0].prefix, [])]) == [[]]
