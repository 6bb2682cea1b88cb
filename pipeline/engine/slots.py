"""The engine: an image's prompt is read once, and a place that falls free is filled at once.

Requests of all callers wait in one queue. A round fills free slots and rows, then takes one more
token for every row: no answer waits for a longer one, nor a call for another. How many slots and
rows there are follows from a budget in bytes (`room.py`). One thread does the work, callers wait.

    picking.py    what is read next
    prompts.py    reads it
    stepper.py    one more token for each row
    settling.py   outcomes, and what follows from them
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from pipeline.engine.kv import shape_of
from pipeline.engine.language import Language
from pipeline.engine.live import NOWHERE, Job, Live, Row
from pipeline.engine.look import Looker
from pipeline.engine.memory import Shortage, does_not_fit, within_memory
from pipeline.engine.picking import Picking
from pipeline.engine.prompts import Filling, read_prompts, taken_in
from pipeline.engine.request import Outcome, Request
from pipeline.engine.room import Room
from pipeline.engine.said import take
from pipeline.engine.sampling import Chooser
from pipeline.engine.score import scores_of
from pipeline.engine.settling import Settling
from pipeline.engine.stepper import Stepper
from schemas.errors import DeviceOutOfMemory, GenerateError, PromptTooLong

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

CPU_PREFILL_TOKENS = 4096
PREFILL_TOKENS = 16384
"""Of one pass, about: enough to keep a device busy, on a CPU few enough to stay in its caches."""

LINGER_S = 2.0
"""That the thread waits for more work."""
GLANCE_S = 0.1
"""How often it looks, meanwhile, whether the program is over."""

T = TypeVar("T")


class SlotsEngine:
    """Answers requests. Safe to call from several threads: their requests mix.

    In float32 each greedy answer is token for token what transformers' `generate` gives for that
    prompt alone, whatever else is in flight (ties of the top two logits within rounding aside).

    `table`: float32 [3, 256] of `pixels.pixel_table`. `kv_budget_bytes`: what keys and values may
    take; null: a share of the device's memory (`memory.py`). `attention`: as `model.attention` of a
    spec. `compiled`: as in Language and Looker; raises SpecError.
    """

    def __init__(  # noqa: PLR0913 (all but the model by name)
        self,
        model: "LlavaForConditionalGeneration",
        *,
        eos_token_ids: Sequence[int],
        table: np.ndarray,
        kv_budget_bytes: int | None = None,
        attention: str = "auto",
        compiled: bool = False,
    ) -> None:
        text = model.config.get_text_config()
        self._eos = frozenset(eos_token_ids)
        self._device: torch.device = model.device
        self._context: int = text.max_position_embeddings
        self._image_token_id: int = model.config.image_token_id
        self._looker = Looker(model, table, compiled=compiled)
        self._language = Language(model, attention=attention, compiled=compiled)
        self._stepper = Stepper(self._language, compiled=compiled)
        self._chooser = Chooser(
            eos=self._eos, device=self._device, choose_likeliest=self._language.likeliest
        )
        self._room = Room(shape_of(text, dtype=model.dtype, device=model.device), kv_budget_bytes)
        on_cpu = self._device.type == "cpu"
        self._prefill_tokens = CPU_PREFILL_TOKENS if on_cpu else PREFILL_TOKENS
        self._live: Live | None = None
        self._queue: deque[Job] = deque()
        self._at_hand: Sequence[Job] = ()
        self._finished: list[tuple[Row, Outcome]] = []
        self._settling = Settling(self._impossible)
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """One outcome for each branch of each request, in the order of their numbers.

        Raises what the model raises, other than for want of memory, and what `grow` raises.
        """
        over = threading.Semaphore(0)
        jobs = [Job(request, over.release) for request in requests]
        asked = [job for job in jobs if job.request.branches]
        for job in asked:
            self._refuse_impossible(job)
        self._queue_up([job for job in asked if job.waiting])
        for _ in asked:
            over.acquire()
        for job in asked:
            if job.error:
                raise job.error
        return [job.settled() for job in jobs]

    def _refuse_impossible(self, job: Job) -> None:
        """Settle what there can never be room for."""
        for row in list(job.waiting):
            if job.error is None and (error := self._impossible(row)):
                job.waiting.remove(row)
                self._settling.settle(row, error)

    def _impossible(self, row: Row) -> Outcome | None:
        """Why there can never be room. What is only a guess is cut down to what there may be."""
        longest = row.job.prefix_tokens + row.most_tokens + 1
        if longest > self._context:
            return PromptTooLong(
                f"prompt and answer may have {longest} tokens, the context {self._context}: ask a "
                "shorter question or lower max_new_tokens"
            )
        needed, budget = self._room.bytes_of(row), self._room.budget_bytes
        if needed > budget:
            return DeviceOutOfMemory(
                f"keys and values of the row may take {needed:,} bytes, there are {budget:,} in "
                "kv_budget_bytes: raise it or lower max_new_tokens"
            )
        most = min(self._context - row.job.prefix_tokens, self._room.most_beside(row))
        row.wanted_tokens = min(row.wanted_tokens, most)
        return None

    def _queue_up(self, jobs: Sequence[Job]) -> None:
        with self._arrived:
            for job in jobs:
                self._looker.want(job.request.prefix)
            self._queue.extend(jobs)
            if self._thread is None:
                # No daemon: one that is inside torch when the interpreter ends aborts the process.
                self._thread = threading.Thread(
                    target=self._run, name="lavaflow-slots", daemon=False
                )
                self._thread.start()
            self._arrived.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        while threading.main_thread().is_alive():
            with self._arrived:
                if not self._is_asked():
                    # Nothing holds an engine then that nobody asks any more.
                    self._thread = None
                    return
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 (raised by those who wait)
                self._fail_all(error)
        self._fail_all(RuntimeError("the program ended before the engine had answered"))

    def _is_asked(self) -> bool:
        """Whether there is work, or comes soon enough."""
        until = time.monotonic() + LINGER_S
        while not self._arrived.wait_for(self._has_work, timeout=GLANCE_S):
            if time.monotonic() > until or not threading.main_thread().is_alive():
                return False
        return True

    def _has_work(self) -> bool:
        return bool(self._queue) or (self._live is not None and bool(self._live.at_work))

    def _round(self) -> None:
        while fillings := self._next_fillings():
            self._fill(fillings)
        if self._live is not None and self._live.rows:
            self._advance(list(self._live.rows))
            self._settle_finished()

    def _fail_all(self, error: Exception) -> None:
        with self._arrived:
            at_work = self._live.at_work if self._live else []
            jobs = {*self._at_hand, *at_work, *self._queue}
            self._queue.clear()
            self._live, self._at_hand, self._finished = None, (), []
            self._looker.forget()
        for job in jobs:
            job.fail(error)

    # Filling free places

    def _next_fillings(self) -> list[Filling]:
        """What is read next, in the order of the queue: one pass, about."""
        with self._arrived:
            waiting = list(self._queue)
        room = self._room.made(self._live, waiting)
        self._live = live = None if isinstance(room, Shortage) else room
        if isinstance(room, Shortage):
            self._refuse(waiting[0], room)
        if live is None:
            return []
        self._put_back_too_long(live)
        if live.is_closing:
            waiting = []
        picking = Picking(live, most_tokens=self._tokens_of_a_pass(live, waiting))
        for job in [*live.jobs, *waiting]:
            if not picking.take(job):
                break
            if job.slot == NOWHERE:
                self._leave_queue(job)
        return picking.fillings

    def _tokens_of_a_pass(self, live: Live, queued: Sequence[Job]) -> int:
        """Passes of one size: a small one at the end would be slow for what it reads. What there
        is no row for does not count."""
        asked = (job for job in itertools.chain(live.jobs, queued) if job.waiting)
        tokens = sum(len(row.unread) for row in live.continuing)
        tokens += sum(job.unread_tokens for job in itertools.islice(asked, live.free_rows))
        passes = max(1, -(-tokens // self._prefill_tokens))
        return max(1, -(-tokens // passes))

    def _put_back_too_long(self, live: Live) -> None:
        """What follows an answer may be longer than rows are wide: once nothing of its job is at
        work, that takes its turn anew."""
        for job in [job for job in live.jobs if job.grows and not job.live]:
            if not live.holds(job.waiting[0]):
                live.remove_job(job)
                self._ask_again(job)

    def _refuse(self, job: Job, shortage: Shortage) -> None:
        """The device has no room for a row of its size."""
        self._leave_queue(job)
        self._looker.let_go(job.request.prefix)
        needed = max(self._room.bytes_of(row) for row in job.waiting)
        what = f"the row, with {needed:,} bytes of keys and values,"
        error = DeviceOutOfMemory(does_not_fit(what, self._device, shortage))
        self._settling.settle_waiting(job, error)

    def _leave_queue(self, job: Job) -> None:
        with self._arrived:
            self._queue.remove(job)

    def _fill(self, fillings: Sequence[Filling]) -> None:
        """Look at the images that are missing, and read the prompts."""
        self._at_hand = [filling.job for filling in fillings]
        new = [job for job in self._at_hand if job.slot == NOWHERE]
        self._looker.look(job.request.prefix for job in new)
        self._read([ready for each in fillings if (ready := self._with_features(each))])
        self._settle_finished()
        for job in self._at_hand:
            self._settle_down(job)
        self._at_hand = ()

    def _settle_down(self, job: Job) -> None:
        """Of a job that was at hand, all may have failed, or all but what waits."""
        assert self._live is not None
        if job.slot == NOWHERE:
            self._ask_again(job)
        else:
            self._live.let_go(job)

    def _with_features(self, filling: Filling) -> Filling | None:
        """Null where there are none, and all its branches have failed."""
        job = filling.job
        if job.slot != NOWHERE:
            return filling
        features = self._looker.features(job.request.prefix)
        self._looker.let_go(job.request.prefix)
        if not isinstance(features, GenerateError):
            return replace(filling, features=features)
        for row in filling.rows:
            self._settling.settle(row, features)
        self._settling.settle_waiting(job, features)
        return None

    def _read(self, fillings: Sequence[Filling]) -> None:
        """Read the prompts; where memory runs out, half as many at a time."""
        if not fillings:
            return
        short = within_memory(lambda: self._begin(fillings), self._device)
        if short is None:
            return
        first = fillings[0]
        if len(fillings) > 1:
            for half in _halves(fillings):
                self._read(half)
        elif len(first.rows) > 1:
            for rows in _halves(first.rows):
                self._read([replace(first, rows=rows)])
        else:
            self._give_up(first.rows[0], short)

    def _give_up(self, row: Row, shortage: Shortage) -> None:
        """It does not fit, even alone. What has been written of it may be anything."""
        row.job.may_be_poisoned = True
        tokens = row.job.prefix_tokens + len(row.branch.token_ids) + row.said.count
        what = f"the row, with {tokens} tokens until now,"
        error = DeviceOutOfMemory(does_not_fit(what, self._device, shortage))
        if row.index == NOWHERE:
            self._settling.settle(row, error)
        else:
            self._finished.append((row, error))

    def _ask_again(self, job: Job) -> None:
        """What waits of a job that has no slot takes its turn anew."""
        if job.waiting and job.slot == NOWHERE:
            with self._arrived:
                self._looker.want(job.request.prefix)
                self._queue.appendleft(job)

    def _begin(self, fillings: Sequence[Filling]) -> None:
        live = self._live
        assert live is not None
        rows = [row for filling in fillings for row in filling.rows]
        with taken_in(fillings, live) as taken:
            read = read_prompts(taken, live, self._language, image_token_id=self._image_token_id)
            scored = [row for row in rows if row.branch.scored]
            scores = self._scores(scored, read.scored)
            self._take([row for row in rows if not row.branch.scored], read.asked)
        self._finished += zip(scored, scores, strict=True)

    def _scores(self, rows: Sequence[Row], hidden: torch.Tensor) -> Sequence[Outcome]:
        if not rows:
            return []
        return scores_of(
            [row.branch for row in rows],
            hidden,
            logits_of=self._language.logits,
            eos=self._eos,
            prompt_tokens=[row.said.prompt_tokens - row.branch.scored for row in rows],
        )

    # One more token

    def _advance(self, rows: Sequence[Row]) -> None:
        """A token for each of neighbouring rows; where memory runs out, half as many at a time."""
        with self._language.threads.enough_for(len(rows)):
            short = within_memory(lambda: self._decode(rows), self._device)
        if short is None:
            return
        if len(rows) > 1:
            for half in _halves(rows):
                self._advance(half)
        else:
            self._give_up(rows[0], short)

    def _decode(self, rows: Sequence[Row]) -> None:
        assert self._live is not None
        self._take(rows, self._stepper.run(self._live, rows))

    def _take(self, rows: Sequence[Row], hidden: torch.Tensor) -> None:
        """The next token of each. [rows, hidden]"""
        if not rows:
            return
        assert self._live is not None
        saids = [row.said for row in rows]
        tokens, chosen = self._chooser.choose(self._language.logits(hidden), saids)
        self._live.say(rows, tokens)
        outcomes = take(saids, chosen, eos=self._eos)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome is not None:
                self._finished.append((row, outcome))

    def _settle_finished(self) -> None:
        assert self._live is not None
        finished, self._finished = self._finished, []
        self._settling.settle_all(finished, self._live)


def _halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    half = (len(items) + 1) // 2
    return items[:half], items[half:]
