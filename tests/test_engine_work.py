"""How much work the slots engine does, and what it takes: counted, never timed."""

import gc
import os
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.agreement import forced
from jobs.baseline import Baseline, twin
from jobs.race import tokens_of
from jobs.subject import load_subject
from jobs.workload import noise, questions
from pipeline.engine import memory, slots
from pipeline.engine.kernels import Kernels
from pipeline.engine.kv import rounded, shape_of
from pipeline.engine.live import Row
from pipeline.engine.pixels import pixel_table
from pipeline.engine.request import Answer, Branch, Outcome, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from schemas.job import ModelSpec
from tests import scarce
from tests.models import shared_checkpoint, tiny_model, tiny_processor

PREFIX, QUESTION = 20, 6
WAIT_S = 10
"""For what comes at once, unless it never does."""

Lengths = Sequence[Sequence[int]]
"""Of answers, by request."""


class Watched(SlotsEngine):
    """Answers are as long as they may be. `steps`: of each, the `id` of every row's request, and
    how many rows waited."""

    def __init__(self, model: Any, *, budget_tokens: int, **options: Any) -> None:
        shape = shape_of(model.config.get_text_config(), dtype=model.dtype, device=model.device)
        super().__init__(
            model,
            eos_token_ids=[],
            table=pixel_table(tiny_processor()),
            kv_budget_bytes=budget_tokens * shape.token_bytes,
            **options,
        )
        self.steps: list[tuple[list[int], int]] = []
        self.before_step: Callable[[], None] = lambda: None

    @property
    def waiting(self) -> int:
        """Rows that have no place yet."""
        at_work = self._live.at_work if self._live else set()
        return sum(len(job.waiting) for job in {*self._queue, *at_work})

    def _decode(self, rows: Sequence[Row]) -> None:
        self.steps.append(([id(row.job.request) for row in rows], self.waiting))
        self.before_step()
        super()._decode(rows)


def requests(lengths: Lengths, *, prefix: int = PREFIX, question: int = QUESTION) -> list[Request]:
    """Text only."""
    made = []
    for number, of_one in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(5, 250, (1 + len(of_one), max(prefix, question)), generator=generator)
        lead, *asked = ids.tolist()
        branches = [
            Branch(each[:question], length) for each, length in zip(asked, of_one, strict=True)
        ]
        made.append(Request(Prefix(lead[:prefix]), branches))
    return made


def check(outcomes: Sequence[Sequence[Outcome]], lengths: Lengths) -> None:
    """As long as was asked for."""
    said = [
        [each.output_tokens for each in of_one if isinstance(each, Answer)] for of_one in outcomes
    ]
    assert said == [list(of_one) for of_one in lengths]


LONG_AND_SHORT = [2, 3, 40, 2, 4, 1, 2, 3]
"""Of eight answers in a row, one is long: it would hold up the others of its batch."""


def rounds_of(lengths: Lengths) -> list[int]:
    """Steps that each request takes: its first tokens come of its prompt."""
    return [max(of_one) - 1 for of_one in lengths]


def steps_of_static_batches(lengths: Lengths, *, at_once: int) -> int:
    """Where what is read together ends together."""
    rounds = rounds_of(lengths)
    return sum(max(rounds[start : start + at_once]) for start in range(0, len(rounds), at_once))


def steps_of_full_slots(lengths: Lengths, *, at_once: int) -> int:
    """At most, where no place is free while anything waits: Graham's bound for jobs in a list."""
    rounds = rounds_of(lengths)
    return sum(rounds) // at_once + max(rounds)


@pytest.mark.parametrize(
    ("lengths", "at_once", "rows", "budget_tokens"),
    [
        pytest.param([[length] for length in LONG_AND_SHORT] * 8, 8, 8, 8 * 80, id="rows"),
        pytest.param(
            [[length] * 4 for length in LONG_AND_SHORT] * 6, 4, 16, 4 * (32 + 4 * 48), id="slots"
        ),
    ],
)
def test_what_is_over_leaves_and_its_place_is_filled_at_once(
    lengths: Lengths, at_once: int, rows: int, budget_tokens: int
) -> None:
    engine = Watched(tiny_model(), budget_tokens=budget_tokens)
    check(engine.submit(requests(lengths)), lengths)
    assert {len(at_work) for at_work, waiting in engine.steps if waiting} == {rows}
    most = steps_of_full_slots(lengths, at_once=at_once)
    assert len(engine.steps) <= most
    assert most < 0.5 * steps_of_static_batches(lengths, at_once=at_once)


def test_a_call_enters_while_the_tail_of_the_one_before_is_at_work() -> None:
    """As an actor's next batch does (`flow.CALLS_AT_ONCE`)."""
    lengths = [[3]] * 8 + [[40]]
    calls = [requests(lengths), requests(lengths)]
    engine = Watched(tiny_model(), budget_tokens=4 * 80)
    is_at_work = threading.Event()

    def wait_for_the_other() -> None:
        engine.before_step = lambda: None
        here = engine.waiting
        is_at_work.set()
        with engine._arrived:
            has_come = lambda: engine.waiting == here + len(lengths)  # noqa: E731
            assert engine._arrived.wait_for(has_come, WAIT_S), "the second call is kept waiting"

    engine.before_step = wait_for_the_other
    with ThreadPoolExecutor(2) as pool:
        answered: list[Future[Any]] = [pool.submit(engine.submit, calls[0])]
        assert is_at_work.wait(WAIT_S)
        answered.append(pool.submit(engine.submit, calls[1]))
        for each in answered:
            check(each.result(), lengths)
    second = {id(request) for request in calls[1]}
    callers = [{each in second for each in rows} for rows, _ in engine.steps]
    long = lengths[-1][0] - 1
    assert {len(rows) for rows, waiting in engine.steps[1:] if waiting} == {4}
    assert callers.count({False, True}) >= long // 2
    assert len(engine.steps) <= steps_of_full_slots(lengths * 2, at_once=4) < 2 * long


class Looked:
    """`steps`: what attention is asked to look at in each step, sequences and keys of each."""

    def __init__(self, engine: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[set[tuple[int, int]]] = []
        self._is_step = False
        attend, run = Kernels.attend, engine._stepper.run

        def watched(kernels: Kernels, query: Any, keys: Any, bias: Any, **options: Any) -> Any:
            if self._is_step:
                sequences, _, columns, _ = keys[0].shape
                self.steps[-1].add((sequences, columns))
            return attend(kernels, query, keys, bias, **options)

        def step(*args: Any) -> torch.Tensor:
            self.steps.append(set())
            self._is_step = True
            try:
                return run(*args)
            finally:
                self._is_step = False

        monkeypatch.setattr(Kernels, "attend", watched)
        engine._stepper.run = step  # type: ignore[method-assign]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_looks_at_what_is_live_however_much_room_there_is(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no place that is free, and no farther than the longest of those that are not."""
    engine = Watched(tiny_model(), budget_tokens=5_000, attention=attention)
    wide = [[2, 2]] * 5
    check(engine.submit(requests(wide, prefix=200, question=100)), wide)
    looked = Looked(engine, monkeypatch)
    in_slots, alone = [[4, 4], [4, 4, 4]], [[5], [3], [5]]
    check(engine.submit(requests(in_slots)), in_slots)
    check(engine.submit(requests(alone)), alone)
    prefixes, whole = (2, rounded(PREFIX)), PREFIX + QUESTION
    assert looked.steps[:3] == [{prefixes, (5, QUESTION + n)} for n in (1, 2, 3)]
    assert looked.steps[3:] == [{(rows, whole + n)} for n, rows in enumerate([3, 3, 2, 2], 1)]
    assert engine._live is not None
    assert engine._live.size.widths == (rounded(200), rounded(101))
    assert (engine._live.free_slots, engine._live.free_rows) == (5, 10)


class Held(TorchDispatchMode):
    """Counts bytes of tensors that are made meanwhile: `bytes` now, `most_bytes` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most_bytes = 0
        self._sizes: dict[int, int] = {}
        """By storage."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        found = function(*args, **options)
        given = {storage._cdata for storage in _storages((args, options))}
        for storage in _storages(found):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._hold(storage)
        return found

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._let_go, storage._cdata)
        self.bytes += storage.nbytes()
        self.most_bytes = max(self.most_bytes, self.bytes)

    def _let_go(self, storage: int) -> None:
        self.bytes -= self._sizes.pop(storage)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    tensors = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
    return (tensor.untyped_storage() for tensor in tensors)


class Weighed(Watched):
    """What all its tensors but the weights take is in `held`."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.held = Held()

    def _run(self) -> None:
        with self.held:
            super()._run()

    @property
    def room_bytes(self) -> int:
        assert self._live is not None
        return self._live.prefixes.nbytes + self._live.branches.nbytes


BUDGET_TOKENS, PASS_TOKENS = 512, 128
IN_ONE_PASS = 4
"""Of `scarce.requests`: more tokens than a pass has, the last prompt included that overfills it."""
FEW, MANY = 5, 50


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "CPU_PREFILL_TOKENS", PASS_TOKENS)


def submit_in_calls(engine: SlotsEngine, images: int) -> None:
    """Ask about as many, each call as the one before."""
    for _ in range(images // FEW):
        scarce.told(engine.submit(scarce.requests(FEW)))


def activations_of_one_pass() -> int:
    """Bytes, at most."""
    engine = Weighed(tiny_model(), budget_tokens=BUDGET_TOKENS)
    engine._prefill_tokens = 100 * PASS_TOKENS
    engine.submit(scarce.requests(IN_ONE_PASS))
    return engine.held.most_bytes - engine.room_bytes


@pytest.mark.usefixtures("small_passes")
def test_tensors_take_the_budget_and_one_prefill_at_most_however_many_rows_there_are() -> None:
    """Beside the weights."""
    engine = Weighed(tiny_model(), budget_tokens=BUDGET_TOKENS)
    submit_in_calls(engine, FEW)
    most_of_few = engine.held.most_bytes
    submit_in_calls(engine, MANY)
    assert engine.held.most_bytes == most_of_few
    budget_bytes = engine._room.budget_bytes
    assert 0.9 * budget_bytes < engine.room_bytes <= budget_bytes
    assert engine.room_bytes < most_of_few <= budget_bytes + activations_of_one_pass()


@pytest.fixture
def traced() -> Iterator[None]:
    """What Python and numpy allocate is counted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("small_passes", "traced")
def test_nothing_is_kept_of_what_is_answered() -> None:
    engine = SlotsEngine(
        tiny_model(), eos_token_ids=[], table=pixel_table(tiny_processor()), kv_budget_bytes=2**18
    )
    submit_in_calls(engine, FEW)
    left = []
    for images in (FEW, MANY):
        submit_in_calls(engine, images)
        gc.collect()
        left.append(tracemalloc.get_traced_memory()[0])
    pixels_bytes = scarce.SIDE**2 * 3
    assert left[1] - left[0] < MANY * pixels_bytes


V1 = "memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("own_groups", "limits", "expected"),
    [
        ("", {}, 25),
        ("0::/\n", {"memory.max": "40"}, 10),
        ("0::/\n", {"memory.max": "max"}, 25),
        ("0::/\n", {"memory.max": "400"}, 25),
        ("0::/a/b\n", {"a/memory.max": "40", "a/b/memory.max": "max"}, 10),
        ("0::/a/b\n", {"memory.max": "40", "a/memory.max": "20", "a/b/memory.max": "80"}, 5),
        ("0::/docker/as-the-host-has-it\n", {"memory.max": "40"}, 10),
        ("3:cpu:/\n2:memory:/a\n0::/\n", {f"memory/a/{V1}": "40"}, 10),
        ("2:hugetlb,memory:/docker/as-the-host-has-it\n", {f"memory/{V1}": "40"}, 10),
        ("2:memory:/\n", {f"memory/{V1}": str(2**63 - 4096)}, 25),
    ],
)
def test_on_a_cpu_keys_may_take_a_quarter_of_what_the_machine_or_the_container_has(
    own_groups: str,
    limits: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 1}.__getitem__)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    memory.OWN_GROUPS.write_text(own_groups)
    for name, limit in limits.items():
        file = memory.GROUPS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert memory.default_kv_budget_bytes(torch.device("cpu")) == expected


def test_where_nothing_is_told_of_groups_the_machine_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "none")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.default_kv_budget_bytes(torch.device("cpu")) == whole // 4


def test_on_a_gpu_keys_may_take_four_fifths_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def free(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 1_000, 5_000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    assert memory.default_kv_budget_bytes(torch.device("cuda:1")) == 800
    assert asked == [torch.device("cuda:1")]


def test_an_engine_that_is_told_no_budget_takes_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2_000, "SC_PAGE_SIZE": 1}.__getitem__)
    monkeypatch.setattr(memory, "OWN_GROUPS", Path("/nowhere"))
    engine = SlotsEngine(tiny_model(), eos_token_ids=[], table=pixel_table(tiny_processor()))
    assert engine._room.budget_bytes == 500


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_float16_the_engine_says_what_the_model_does(attention: str) -> None:
    """What is likeliest of nearly equal tokens is left to rounding."""
    subject = load_subject(ModelSpec(path=str(shared_checkpoint()), dtype="float16"))
    assert subject.model.dtype == torch.float16
    images = noise(subject.image_shape, 6, seed=0)
    work = questions(subject.vocabulary, images, each=4, new_tokens=6, seed=0)
    baseline = Baseline(subject.model, work, subject.table)
    engine = SlotsEngine(
        twin(subject.model),
        eos_token_ids=[],
        table=subject.table,
        kv_budget_bytes=200_000,
        attention=attention,
    )
    said = tokens_of(work, engine.submit(work.requests(0)))
    found = forced(baseline, work.rows, dict(enumerate(said)))
    assert found["tokens"] == 6 * 4 * 6
    assert found["ok"], found
