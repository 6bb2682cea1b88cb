"""The slots engine against transformers' `generate` on each prompt alone, unpadded."""

import copy
import gc
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
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
from transformers import MistralConfig, Qwen2Config

from pipeline.engine import live, look, prefill, slots, step, stepper
from pipeline.engine.attention import Asked
from pipeline.engine.kv import KVArena, rounded, shape_of
from pipeline.engine.live import Live
from pipeline.engine.memory import is_out_of_memory
from pipeline.engine.picking import Picking
from pipeline.engine.pixels import pixel_table
from pipeline.engine.replays import Replays, Run
from pipeline.engine.request import Answer, Branch, Decoding, ImagePixels, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from pipeline.engine.traced import TracedStep
from schemas.errors import (
    DeviceOutOfMemory,
    NonFiniteLogits,
    PromptTooLong,
    SpecError,
    TokenFeatureMismatch,
)
from tests.engine_cases import EOS, alone, cases_of, check, request_of
from tests.flash import stand_in
from tests.models import tiny_model, tiny_processor
from tests.turns import Asking, talk

IMAGES, QUESTIONS = 4, 12
FLASH = "flash_attention_2"
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
        self.processor, self.shape = processor, shape
        self.model = tiny_model(**shape)
        self.cases = cases_of(IMAGES, QUESTIONS)
        self.expected = [alone(self.model, processor, case) for case in self.cases]

    def engine(self, *, slots: float = 32.0, model: Any = None, **options: Any) -> SlotsEngine:
        """With a budget for about so many prompts."""
        model = copy.deepcopy(self.model) if model is None else model
        shape = shape_of(model.config.get_text_config(), dtype=model.dtype, device=model.device)
        return SlotsEngine(
            model,
            eos_token_ids=EOS,
            table=pixel_table(self.processor),
            kv_budget_bytes=int(slots * 96 * shape.token_bytes),
            **options,
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
def test_a_compiled_text_model_gives_the_same(llama: Known) -> None:
    compiled = counters["stats"]["unique_graphs"]
    engine = llama.engine(slots=5, compiled=True)
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


# Degrading


class Scarce:
    """Memory of a device that holds so many tokens of one pass, or images of one look. It runs out
    at the end, when keys and values have been written."""

    def __init__(self, engine: SlotsEngine, *, tokens: int, images: int, error: Exception) -> None:
        self._engine, self._tokens, self._images, self._error = engine, tokens, images, error
        self.most_tokens = 0
        self.looked = 0
        run, looked = engine._language.run, engine._looker._looked

        def scarce_run(what: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden = run(what, embeds, positions)
            if len(embeds) > self._tokens:
                raise self._error
            self.most_tokens = max(self.most_tokens, len(embeds))
            return hidden

        def scarce_look(images: Sequence[Any]) -> Any:
            if len(images) > self._images:
                raise self._error
            self.looked += len(images)
            return looked(images)

        engine._language.run = scarce_run  # type: ignore[method-assign]
        engine._looker._looked = scarce_look  # type: ignore[method-assign]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError("std::bad_alloc"),
]


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        *((error, True) for error in OUT_OF_MEMORY),
        (MemoryError(), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied\nout of memory"), False),
    ],
)
def test_that_memory_has_run_out_is_known_by_who_says_so(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_what_does_not_fit_is_halved_and_answers_stay_the_same(
    llama: Known, error: Exception
) -> None:
    engine = llama.engine()
    scarce = Scarce(engine, tokens=70, images=1, error=error)
    llama.check(engine, groups_of([12, 1, 3, 2], random.Random(0)))
    assert scarce.most_tokens <= 70


@pytest.mark.parametrize("place", [0, 3, 12])
@pytest.mark.parametrize("longest", [1, 9])
def test_nothing_is_left_of_a_request_whose_row_does_not_fit(
    llama: Known, place: int, longest: int
) -> None:
    """Wherever it stands among more rows than there is room for, at work or over at once."""
    engine = llama.engine(slots=2)
    Scarce(engine, tokens=70, images=4, error=OUT_OF_MEMORY[0])
    prefix = llama.requests([[0]])[0].prefix
    branches = [Branch((100 + n, 7), longest) for n in range(12)]
    alone = [llama.engine().submit([Request(prefix, [each])])[0] for each in branches]
    branches.insert(place, Branch([5] * 71, 2))
    [outcomes] = engine.submit([Request(prefix, branches)])
    refused = outcomes.pop(place)
    assert isinstance(refused, DeviceOutOfMemory)
    told = r"the row, with \d+ tokens until now, does not .*: CUDA out of memory; \d[\d,]+ bytes"
    assert re.match(told, str(refused))
    for answer, [known] in zip(outcomes, alone, strict=True):
        assert isinstance(answer, Answer)
        assert isinstance(known, Answer)
        assert answer.token_ids == known.token_ids
    for _ in range(500):
        if not engine._has_work():
            return
        time.sleep(0.01)
    pytest.fail("the engine is still at work, and nobody waits for it")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_an_allocation_that_really_fails_fails_its_row_only() -> None:
    """Short prompts are answered as without a limit, beside the long one and after it."""
    run = [sys.executable, "-m", "tests.scarce", "limited"]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    name, message = found.pop("long")
    assert name == "DeviceOutOfMemory"
    assert "does not fit the memory of cpu" in message
    assert found == {"equal": True, "after": True}


def test_keys_and_values_never_take_more_than_the_budget(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rooms follow each other, and nothing is left behind by ten times the rows."""
    arenas: weakref.WeakSet[KVArena] = weakref.WeakSet()
    taken: list[int] = []
    make = KVArena.__init__

    def counted(arena: KVArena, *args: Any, **options: Any) -> None:
        make(arena, *args, **options)
        arenas.add(arena)
        taken.append(sum(each.nbytes for each in arenas))

    monkeypatch.setattr(KVArena, "__init__", counted)
    engine = llama.engine(slots=6)
    tensors = []
    for call in range(10):
        llama.check(engine, groups_of([1, 12, 3, 1, 2][: 1 + call % 5], random.Random(call)))
        tensors.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert max(taken) <= engine._room.budget_bytes
    assert max(taken) > engine._room.budget_bytes / 2
    assert len(taken) > 4
    assert max(tensors[5:]) <= max(tensors[:5])


def test_an_image_that_does_not_fit_fails_all_its_questions(llama: Known) -> None:
    engine = llama.engine()
    Scarce(engine, tokens=10_000, images=0, error=OUT_OF_MEMORY[1])
    outcomes = engine.submit(llama.requests(groups_of([3, 1], random.Random(0))))
    assert {type(o) for o in itertools.chain(*outcomes)} == {DeviceOutOfMemory}
    assert "the image, 32 x 32 x 3 for the vision tower, does not fit" in str(outcomes[0][0])


def test_nothing_is_kept_of_a_request_for_which_there_is_no_room(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has less than the budget says."""
    engine, requests = llama.engine(), llama.requests([[0, 4], [1]])

    def scarce(*_: object) -> Live:
        raise OUT_OF_MEMORY[1]

    with monkeypatch.context() as patch:
        patch.setattr(Live, "empty", scarce)
        outcomes = engine.submit(requests)
    assert {type(o) for o in itertools.chain(*outcomes)} == {DeviceOutOfMemory}
    assert "bytes of keys and values, does not fit the memory of cpu" in str(outcomes[0][0])
    llama.check(engine, [[0, 4], [1]])
    assert not engine._looker._seen
    assert not engine._looker._wanted


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


def test_an_error_that_is_not_about_memory_reaches_every_caller(llama: Known) -> None:
    engine = llama.engine()
    right = engine._language.run
    engine._language.run = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        engine.submit(llama.requests([[0], [1, 5]]))
    engine._language.run = right  # type: ignore[method-assign]
    llama.check(engine, [[0], [1, 5]])


def test_an_image_is_looked_at_once_while_anybody_waits_for_it(llama: Known) -> None:
    engine = llama.engine()
    scarce = Scarce(engine, tokens=10_000, images=100, error=OUT_OF_MEMORY[0])
    llama.check(engine, [[i] for i in range(16)])
    assert scarce.looked == IMAGES
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


def test_a_budget_for_less_than_a_row_is_told_with_the_figures(llama: Known) -> None:
    engine = llama.engine(slots=0.5)
    [[outcome], [short]] = engine.submit(
        [
            *llama.requests([[0]]),
            Request(Prefix([1]), [Branch([5, 6], 2)]),
        ]
    )
    assert isinstance(outcome, DeviceOutOfMemory)
    assert f"{engine._room.budget_bytes:,} in kv_budget_bytes" in str(outcome)
    assert isinstance(short, Answer)


def test_a_prompt_beyond_the_context_fails_alone(llama: Known) -> None:
    long = llama.requests([[0]])[0]
    long = Request(long.prefix, [Branch([5] * 600, 3), *long.branches])
    [[outcome, fine]] = llama.engine().submit([long])
    assert isinstance(outcome, PromptTooLong)
    assert "512" in str(outcome)
    check(fine, llama.expected[0])


def poisoned(llama: Known, token: int, *, slots: int = 4) -> SlotsEngine:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return llama.engine(model=model, slots=slots)


def test_logits_that_are_not_finite_fail_their_row_only(llama: Known) -> None:
    """The guilty one's keys are gone, too, when its place is used again."""
    unused = 250
    requests = llama.requests(groups_of([3, 2, 4, 1, 2], random.Random(0)))
    bad = requests[1]
    branches = [Branch([*bad.branches[0].token_ids, unused], 5), *bad.branches]
    requests[1] = Request(bad.prefix, branches)
    outcomes = poisoned(llama, unused).submit(requests)
    guilty = outcomes[1].pop(0)
    assert isinstance(guilty, NonFiniteLogits)
    groups = groups_of([3, 2, 4, 1, 2], random.Random(0))
    for group, answers in zip(groups, outcomes, strict=True):
        for i, answer in zip(group, answers, strict=True):
            check(answer, llama.expected[i])


def test_a_prefix_that_is_not_finite_fails_its_own_questions_only(llama: Known) -> None:
    unused = 250
    good, bad = llama.requests([[0, 4], [1, 5]])
    ids = [unused, *bad.prefix.token_ids]
    engine = poisoned(llama, unused)
    for _ in range(2):
        outcomes = engine.submit([Request(Prefix(ids, bad.prefix.images), bad.branches), good])
        assert {type(outcome) for outcome in outcomes[0]} == {NonFiniteLogits}
        for i, answer in zip([0, 4], outcomes[1], strict=True):
            check(answer, llama.expected[i])


def in_room_for(llama: Known, requests: Sequence[Request], *, slots: int, rows: int) -> SlotsEngine:
    """As wide as they need; token 250 is poison."""
    engine = poisoned(llama, 250)
    prefix = max(rounded(len(request.prefix.token_ids)) for request in requests)
    branches = [branch for request in requests for branch in request.branches]
    branch = max(rounded(len(each.token_ids) + each.max_new_tokens - 1) for each in branches)
    engine._room._tokens = slots * prefix + rows * branch
    return engine


def test_a_prefix_that_is_not_finite_leaves_nothing_where_its_job_is_moved_from(
    llama: Known,
) -> None:
    """It moves, since more of its questions wait; a shorter one takes the place that it leaves."""
    first, bad, last = llama.requests([[0], [1, 5, 9, 13, 17, 21], [2, 6]])
    first = Request(first.prefix, [Branch(first.branches[0].token_ids, 1)])
    bad = Request(Prefix([250] * 40 + [*bad.prefix.token_ids], bad.prefix.images), bad.branches)
    engine = in_room_for(llama, [first, bad, last], slots=2, rows=6)
    _, lost, fine = engine.submit([first, bad, last])
    assert {type(outcome) for outcome in lost} == {NonFiniteLogits}
    for i, answer in zip([2, 6], fine, strict=True):
        check(answer, llama.expected[i])


def test_what_is_not_finite_and_does_not_fit_leaves_nothing_in_its_place(llama: Known) -> None:
    """Memory runs out when its keys have been written; a shorter one takes the place."""
    first, bad, last = llama.requests([[0], [1], [2, 6]])
    bad = Request(Prefix([250] * 60 + [*bad.prefix.token_ids], bad.prefix.images), bad.branches * 2)
    engine = in_room_for(llama, [first, bad, last], slots=3, rows=5)
    Scarce(engine, tokens=85, images=4, error=OUT_OF_MEMORY[0])
    [known], lost, fine = engine.submit([first, bad, last])
    assert {type(outcome) for outcome in lost} == {DeviceOutOfMemory}
    for i, answer in zip([0, 2, 6], [known, *fine], strict=True):
        check(answer, llama.expected[i])


def test_a_prefix_that_is_not_finite_leaves_those_alone_that_need_no_slot(llama: Known) -> None:
    unused = 250
    [bad, *good] = llama.requests([[0, 4], [1], [2], [3]])
    # So long that rows are wide enough for the others' prefixes.
    branches = [*bad.branches, Branch(bad.branches[0].token_ids, 300)]
    prefix = Prefix([unused, *bad.prefix.token_ids], bad.prefix.images)
    outcomes = poisoned(llama, unused, slots=64).submit([Request(prefix, branches), *good])
    assert {type(outcome) for outcome in outcomes[0]} == {NonFiniteLogits}
    for i, [answer] in zip([1, 2, 3], outcomes[1:], strict=True):
        check(answer, llama.expected[i])


def test_image_tokens_that_do_not_match_the_features_fail_alone(llama: Known) -> None:
    good, other = llama.requests([[0], [1]])
    bad = Request(Prefix(list(other.prefix.token_ids)[:-1], other.prefix.images), other.branches)
    [[outcome], [fine]] = llama.engine().submit([bad, good])
    assert isinstance(outcome, TokenFeatureMismatch)
    assert "15 image tokens" in str(outcome)
    check(fine, llama.expected[0])


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


# Room


class Watched:
    """An engine with room for 38 usual questions, or for six as long as the context. How many rows
    were at work in each step, and in which room; `at_step` is called before each."""

    def __init__(self, llama: Known, at_step: Callable[[], None] = lambda: None) -> None:
        self.engine = llama.engine(slots=32)
        self.rows: list[int] = []
        self.rooms: list[live.Size] = []
        step = self.engine._stepper.run

        def run(live: live.Live, rows: Sequence[live.Row]) -> torch.Tensor:
            at_step()
            self.rows.append(len(rows))
            if self.rooms[-1:] != [live.size]:
                self.rooms.append(live.size)
            return step(live, rows)

        self.engine._stepper.run = run  # type: ignore[method-assign]

    def said(self, requests: Sequence[Request]) -> list[list[Sequence[int]]]:
        return [[answer.token_ids for answer in each] for each in self.engine.submit(requests)]


def usual(n: int, *, prefix: int = 16, words: int = 8, questions: int = 1) -> Request:
    """10 to 49 tokens are said."""
    longest = 10 + n * 7 % 40
    ids = [[100 + (n + 3 * q + i * i) % 140 for i in range(words)] for q in range(questions)]
    decoding = Decoding(min_new_tokens=longest)
    return Request(Prefix([1] * prefix), [Branch(each, longest, decoding) for each in ids])


LONG = usual(3, words=440)
MANY = [usual(n, prefix=300, words=2, questions=20) for n in (4, 38)]


@pytest.mark.parametrize(
    ("odd", "prefix", "place"),
    [([LONG], 16, 0), ([LONG], 16, 5), ([LONG], 16, 60), (MANY, 64, 0)],
    ids=["long, first", "long", "long, late", "many questions"],
)
def test_the_room_of_odd_requests_is_given_up_after_them(
    llama: Known, odd: Sequence[Request], prefix: int, place: int
) -> None:
    """Though there is always work, which would do in that room, few at a time."""
    others = [usual(n, prefix=prefix) for n in range(150)]
    without, alone, beside = Watched(llama), Watched(llama), Watched(llama)
    expected, expected_odd = without.said(others), alone.said(odd)
    said = beside.said([*others[:place], *odd, *others[place:]])
    assert said == [*expected[:place], *expected_odd, *expected[place:]]
    assert len(beside.rows) < len(without.rows) + len(alone.rows) + 80


@pytest.mark.parametrize("times", [1, 8])
def test_the_room_of_a_small_first_call_does_for_large_ones(llama: Known, times: int) -> None:
    """It can grow, or is as large from the start as there may be."""
    first = [usual(n) for n in (5, 17, 22)] * times
    later = [usual(n) for n in range(200)]
    call = threading.Thread(target=lambda: few.said(later))

    def arrive() -> None:
        if not few.rows:
            call.start()
            while not few.engine._queue:
                time.sleep(0.001)

    few, at_once = Watched(llama, arrive), Watched(llama)
    few.said(first)
    call.join()
    at_once.said([*first, *later])
    assert len(few.rows) < 1.2 * len(at_once.rows)
    assert len(few.rooms) == (2 if times == 1 else 1)


def test_a_long_question_has_its_turn_though_others_keep_coming(llama: Known) -> None:
    came, is_over = itertools.count(40), threading.Event()

    def keep_coming() -> None:
        while not is_over.is_set() and len(steady.engine._queue) < 40 and len(steady.rows) < 1000:
            steady.engine._queue_up([live.Job(usual(next(came)), lambda: None)])

    steady, long = Watched(llama, keep_coming), live.Job(LONG, is_over.set)
    before = [live.Job(usual(n), lambda: None) for n in range(40)]
    steady.engine._queue_up([*before, long])
    assert is_over.wait(timeout=60)
    [answer] = long.settled()
    assert isinstance(answer, Answer)
    assert [[answer.token_ids]] == Watched(llama).said([LONG])
    assert len(steady.rows) < 200


@pytest.mark.parametrize("every", [10, 20, 50])
def test_rooms_change_only_where_that_gains_something(llama: Known, every: int) -> None:
    """There are never more steps than with all in the widest room."""
    requests = [usual(n, words=440 if n % every == 7 else 8) for n in range(200)]
    mixed = Watched(llama)
    mixed.said(requests)
    rows_of_widest = 6
    steps = sum(each.branches[0].max_new_tokens for each in requests) / rows_of_widest
    assert len(mixed.rows) <= 1.02 * steps
    assert len(mixed.rooms) <= 2 * 200 / every + 2


def test_a_device_without_memory_for_more_is_not_asked_again_and_again(
    llama: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, make = [], KVArena.__init__

    def scarce(arena: KVArena, shape: Any, *, capacity: int, width: int) -> None:
        asked.append(capacity * width)
        if capacity * width > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(arena, shape, capacity=capacity, width=width)

    monkeypatch.setattr(KVArena, "__init__", scarce)
    watched = Watched(llama)
    watched.said([usual(n) for n in range(100)])
    assert len(watched.rooms) == 1
    assert len(asked) < 20
