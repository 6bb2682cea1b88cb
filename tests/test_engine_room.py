"""How much room the slots engine makes, and when it makes other room: counted in steps."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pipeline.engine import live
from pipeline.engine.kv import KVArena
from pipeline.engine.request import Answer, Branch, Decoding, Prefix, Request
from tests.slots_cases import Known, known_of


@pytest.fixture(scope="module")
def llama() -> Known:
    return known_of("Llama")


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
