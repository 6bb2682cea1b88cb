"""How many slots and rows there are, and how wide: what a budget in bytes allows.

A slot is as wide as the longest prefix that waits, a row as the longest question with its answer
and a guess of what continues it.
Where every request has one branch only, there are no slots: rows hold the prefixes, too.
What is at work moves into larger room where the budget allows both for a moment; else it is
finished first: where the first that waits does not fit, and where what waits could have far more
rows, as it can after a prompt that was far longer than the others.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

from pipeline.engine.kv import WIDTH_STEP, Shape, rounded
from pipeline.engine.live import NOWHERE, Job, Live, Row, Size
from pipeline.engine.memory import (
    Shortage,
    default_kv_budget_bytes,
    release_cached,
    within_memory,
)

MOST_ROWS = 1024
"""Of one step; more gain nothing."""
FAR = 2
"""So many times fewer rows are worth a change of rooms; less would change them again and again."""


class Room:
    """Makes room within `budget_bytes`; null: a share of the device's memory."""

    def __init__(self, shape: Shape, budget_bytes: int | None) -> None:
        self._shape = shape
        self.budget_bytes = budget_bytes or default_kv_budget_bytes(shape.device)
        self._tokens = self.budget_bytes // shape.token_bytes

    def bytes_of(self, row: Row) -> int:
        """What the row needs, prefix and all."""
        tokens = rounded(row.job.prefix_tokens) + rounded(row.most_tokens)
        return tokens * self._shape.token_bytes

    def most_beside(self, row: Row) -> int:
        """How wide its row can be."""
        return self._tokens // WIDTH_STEP * WIDTH_STEP - rounded(row.job.prefix_tokens)

    def made(self, live: Live | None, waiting: Sequence[Job]) -> Live | Shortage | None:
        """Room for what is at work and what waits, as much as there may be; null where nothing is.

        Each row fits the budget alone. A Shortage where the device has no room for a single one.
        """
        grown = [job for job in live.jobs if job.grows and job.waiting] if live else []
        if not waiting and not grown:
            return live
        at_work = live is not None and bool(live.at_work)
        if live is not None and at_work and (live.is_closing or live.is_largest):
            return live
        wanted = self._wanted([*grown, *waiting], live if at_work else None)
        if live is not None and live.size.holds(wanted) and not live.is_closing:
            return live
        if live is not None and at_work:
            larger = self._larger(live, wanted)
            if larger is live and waiting:
                self._close_if_too_small(live, waiting)
            return larger
        if live is not None:
            live.free()
        release_cached(self._shape.device)
        return self._new(self._scaled(wanted, self._tokens))

    def _wanted(self, waiting: Iterable[Job], live: Live | None) -> Size:
        """For the first jobs, up to one that is far wider: it would leave few rows to the others,
        and gets room of its own when it is the first."""
        sizes = list(self._sizes(waiting, live))
        most_rows = max(size.rows for size in sizes)
        return next(size for size in reversed(sizes) if size.rows * FAR >= most_rows)

    def _sizes(self, waiting: Iterable[Job], live: Live | None) -> Iterator[Size]:
        """What is at work with the first job, the first two, and so on, as many as can be as wide
        as the widest of them."""
        slots, rows = (len(live.jobs), len(live.rows)) if live else (0, 0)
        prefix = branch = whole = 0
        are_whole = not slots
        for n, job in enumerate(itertools.islice(waiting, MOST_ROWS)):
            prefix, branch = max(prefix, job.prefix_tokens), max(branch, job.most_own_tokens)
            if n and rounded(prefix) + rounded(branch) > self._tokens:
                return
            slots, rows = slots + (job.slot == NOWHERE), rows + len(job.waiting)
            are_whole &= job.whole_tokens is not None
            whole = max(whole, job.whole_tokens or 0)
            if are_whole:
                yield self._without_slots(rows, rounded(whole))
            else:
                yield self._with_slots(slots, rows, (rounded(prefix), rounded(branch)))

    def _without_slots(self, rows: int, width: int) -> Size:
        return Size(0, max(1, min(rows, MOST_ROWS, self._tokens // width)), (0, width))

    def _with_slots(self, slots: int, rows: int, widths: tuple[int, int]) -> Size:
        rows = min(rows, MOST_ROWS)
        rows_a_slot = -(-rows // slots)
        slots = max(1, min(slots, self._tokens // (widths[0] + rows_a_slot * widths[1])))
        rows = max(1, min(rows, (self._tokens - slots * widths[0]) // widths[1]))
        return Size(slots, rows, widths)

    def _larger(self, live: Live, wanted: Size) -> Live:
        size = self._beside(live.size, live.size.with_at_least(wanted))
        if size is None:
            return live
        larger = within_memory(lambda: live.resized(self._shape, size), self._shape.device)
        return live if isinstance(larger, Shortage) else larger

    def _beside(self, old: Size, wanted: Size) -> Size | None:
        """As much of what is wanted as there may be beside the old; null where that is no more."""
        left = self._tokens - old.tokens
        size = self._scaled(wanted, left)
        slots = max(old.slots, size.slots, min(wanted.slots, 1))
        size = Size(slots, max(old.rows, size.rows), wanted.widths)
        return size if size.tokens <= left and size != old else None

    def _scaled(self, size: Size, tokens: int) -> Size:
        """As much of it as so many tokens allow; and more, where it could not grow later."""
        share = tokens / size.tokens
        if size.tokens <= self._tokens // 2:
            share = min(1.0, share)
        return Size(int(size.slots * share), min(MOST_ROWS, int(size.rows * share)), size.widths)

    def _close_if_too_small(self, live: Live, waiting: Sequence[Job]) -> None:
        """What cannot grow is left to run empty, once that costs less than what was missed.

        It costs about as many rounds as an answer takes, in which few rows are at work.
        """
        has, could_have = max(1, live.places_for(waiting)), self._wanted(waiting, None).rows
        live.missed_rounds = max(0.0, live.missed_rounds + could_have / has - FAR)
        live.is_closing = live.missed_rounds > max((row.said.count for row in live.rows), default=0)

    def _new(self, wanted: Size) -> Live | Shortage:
        size = wanted
        while True:
            empty = functools.partial(Live.empty, self._shape, size)
            new = within_memory(empty, self._shape.device)
            if isinstance(new, Live):
                new.is_largest = size != wanted
                return new
            if size.slots <= 1 and size.rows == 1:
                return new
            size = Size((size.slots + 1) // 2, (size.rows + 1) // 2, size.widths)
