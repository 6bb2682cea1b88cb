"""What the slots engine cannot answer fails alone: for want of memory, and for what is asked."""

import copy
import gc
import itertools
import json
import random
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.engine.kv import KVArena, rounded
from pipeline.engine.live import Live
from pipeline.engine.memory import is_out_of_memory
from pipeline.engine.request import Answer, Branch, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from schemas.errors import (
    DeviceOutOfMemory,
    NonFiniteLogits,
    PromptTooLong,
    TokenFeatureMismatch,
)
from tests.engine_cases import check
from tests.slots_cases import Known, groups_of, known_of


@pytest.fixture(scope="module")
def llama() -> Known:
    return known_of("Llama")


class Scarce:
    """Memory of a device that holds so many tokens of one pass, or images of one look. It runs out
    at the end, when keys and values have been written."""

    def __init__(self, engine: SlotsEngine, *, tokens: int, images: int, error: Exception) -> None:
        self._engine, self._tokens, self._images, self._error = engine, tokens, images, error
        self.most_tokens = 0
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


def test_an_error_that_is_not_about_memory_reaches_every_caller(llama: Known) -> None:
    engine = llama.engine()
    right = engine._language.run
    engine._language.run = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        engine.submit(llama.requests([[0], [1, 5]]))
    engine._language.run = right  # type: ignore[method-assign]
    llama.check(engine, [[0], [1, 5]])


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
