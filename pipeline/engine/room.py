"""How many slots and rows there are, and how wide: what a budget in bytes allows.

A slot is as wide as the longest prefix that waits, a row as the longest question with its answer
and a guess of what continues it.
Where every request has one branch only, there are no slots: rows hold the prefixes, too.
What is at work moves into larger room where the budget allows both for a moment; else it is
finished first.
"""

import functools
from collections.abc import Iterable, Sequence

from pipeline.engine.kv import WIDTH_STEP, Shape, rounded
from pipeline.engine.live import Job, Live, Row, Size
from pipeline.engine.memory import (
    Shortage,
    default_kv_budget_bytes,
    release_cached,
    within_memory,
)

MOST_ROWS = 1024
"""Of one step; more gain nothing."""


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
        at_work = live is not None and live.at_work
        wanted = self._wanted([*grown, *waiting], live if at_work else None)
        if live is not None and live.size.holds(wanted):
            return live
        if live is not None and at_work:
            return self._larger(live, live.size.with_at_least(wanted))
        if live is not None:
            live.free()
        release_cached(self._shape.device)
        return self._new(wanted)

    def _wanted(self, waiting: Sequence[Job], live: Live | None) -> Size:
        jobs = self._together(waiting)
        widths = _widths(jobs)
        whole = [job.whole_tokens for job in jobs if job.whole_tokens is not None]
        if len(whole) == len(jobs) and not (live and live.jobs):
            width = rounded(max(whole))
            rows = min(len(jobs) + (len(live.rows) if live else 0), MOST_ROWS)
            return Size(0, max(1, min(rows, self._tokens // width)), (0, width))
        slots, rows = len(jobs), sum(len(job.waiting) for job in jobs)
        if live is not None:
            slots, rows = len({*jobs, *live.jobs}), rows + len(live.rows)
        rows = min(rows, MOST_ROWS)
        rows_a_slot = -(-rows // slots)
        slots = max(1, min(slots, self._tokens // (widths[0] + rows_a_slot * widths[1])))
        rows = max(1, min(rows, (self._tokens - slots * widths[0]) // widths[1]))
        return Size(slots, rows, widths)

    def _together(self, waiting: Iterable[Job]) -> list[Job]:
        """The first jobs, as many as can be as wide as the widest of them."""
        jobs: list[Job] = []
        prefix = branch = 0
        for job in waiting:
            prefix, branch = max(prefix, job.prefix_tokens), max(branch, job.most_own_tokens)
            if jobs and rounded(prefix) + rounded(branch) > self._tokens:
                break
            jobs.append(job)
        return jobs

    def _larger(self, live: Live, size: Size) -> Live:
        if live.size.tokens + size.tokens > self._tokens:
            return live
        larger = within_memory(lambda: live.resized(self._shape, size), self._shape.device)
        return live if isinstance(larger, Shortage) else larger

    def _new(self, size: Size) -> Live | Shortage:
        while True:
            empty = functools.partial(Live.empty, self._shape, size)
            new = within_memory(empty, self._shape.device)
            if isinstance(new, Live) or (size.slots <= 1 and size.rows == 1):
                return new
            size = Size((size.slots + 1) // 2, (size.rows + 1) // 2, size.widths)


def _widths(jobs: Sequence[Job]) -> tuple[int, int]:
    return (
        rounded(max(job.prefix_tokens for job in jobs)),
        rounded(max(job.most_own_tokens for job in jobs)),
    )
