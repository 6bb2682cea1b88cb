"""What is being answered: requests in slots, branches in rows, both without gaps.

    Job    a request; its slot holds the keys of its prefix while any branch needs them
    Row    a branch; its row holds the keys of its question and its answer; a lone branch's row
           those of the prefix, too, where it is wide enough: then there is no slot

Whatever is taken out, the last one moves into its place, keys and all; but a branch that continues
one that is over takes its row, and what it has of its keys. Knows the arenas, not the model.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from pipeline.engine.kv import KVArena, Shape
from pipeline.engine.request import Branch, Outcome, Request
from pipeline.engine.said import Said
from pipeline.engine.transfer import sent

NOWHERE = -1


class Job:
    """A request on its way; `is_over` is called once, when all its branches have an outcome or
    `error` is set. What may grow keeps its slot, where others find the prefix that follow."""

    def __init__(self, request: Request, is_over: Callable[[], None]) -> None:
        self.request, self.grows = request, request.grow is not None
        self.error: Exception | None = None
        self.outcomes: list[Outcome | None] = [None] * len(request.branches)
        self.slot = NOWHERE
        self.prefix_tokens = len(request.prefix.token_ids)
        self.waiting = deque(Row(self, n, branch) for n, branch in enumerate(request.branches))
        self.whole_tokens: int | None = None
        """Of prefix, question and answer, where there is one branch only, and none follows."""
        self.live = 0
        self.may_be_poisoned = False
        """Whether what is kept of it may hold numbers that are not finite."""
        self._left = len(request.branches)
        if len(request.branches) == 1 and not self.grows:
            self.whole_tokens = self.prefix_tokens + self.waiting[0].most_tokens
        self._is_over = is_over

    @property
    def most_own_tokens(self) -> int:
        """Of the longest of its branches that wait."""
        return max((row.wanted_tokens for row in self.waiting), default=0)

    @property
    def unread_tokens(self) -> int:
        """Of what waits, and of the prefix where that waits, too."""
        prefix = self.prefix_tokens if self.slot == NOWHERE and self.waiting else 0
        return prefix + sum(len(row.unread) for row in self.waiting)

    def grown(self, number: int, outcome: Outcome) -> list["Row"]:
        """What follows a branch that is about to be settled. Raises what the request raises."""
        if self.request.grow is None or self.error is not None:
            return []
        branches = list(self.request.grow(number, outcome))
        rows = [Row(self, n, branch) for n, branch in enumerate(branches, len(self.outcomes))]
        self.outcomes += [None] * len(rows)
        self._left += len(rows)
        return rows

    def settle(self, number: int, outcome: Outcome) -> None:
        if self.error is not None:
            return
        self.outcomes[number] = outcome
        self._left -= 1
        if not self._left:
            self._is_over()

    def settled(self) -> list[Outcome]:
        """All outcomes; there are as many as branches, or something here is wrong."""
        return [_known(outcome) for outcome in self.outcomes]

    def fail(self, error: Exception) -> None:
        """End without outcomes."""
        self.waiting.clear()
        if self.error is None:
            self.error = error
            self._is_over()


def _known(outcome: Outcome | None) -> Outcome:
    if outcome is None:
        raise RuntimeError("a branch was left without outcome")
    return outcome


class Row:
    """A branch on its way."""

    def __init__(self, job: Job, number: int, branch: Branch) -> None:
        self.job, self.number, self.branch = job, number, branch
        self.index = NOWHERE
        # All but the last token of an answer have keys.
        self.most_tokens = len(branch.token_ids) + branch.max_new_tokens - 1
        self.wanted_tokens = self.most_tokens + branch.later_tokens
        """For which there is to be room, so that others can continue it."""
        self.kept: int | None = None
        """Until it is read: so many tokens' keys are here already."""
        self.said = Said(job.request.prefix.token_ids, branch)
        self.is_whole = False
        """Whether the keys of the prefix are here, and not in a slot."""

    @property
    def own_tokens(self) -> int:
        """Tokens whose keys are here: all but the latest that was said."""
        if self.kept is not None:
            return self.kept
        return self.question_tokens + max(self.said.count - 1, 0)

    @property
    def question_tokens(self) -> int:
        """Of those that are here, or will be, the ones before the answer."""
        own = len(self.branch.token_ids)
        return own + self.job.prefix_tokens if self.is_whole else own

    @property
    def next_position(self) -> int:
        """Of the latest token, which is read next."""
        return self.own_tokens if self.is_whole else self.job.prefix_tokens + self.own_tokens

    @property
    def unread(self) -> Sequence[int]:
        """Tokens of the question that have no keys yet."""
        return self.branch.token_ids[self.kept or 0 :]

    def kept_of(self, other: "Row") -> int:
        """So many first tokens of another one's question and answer, of those that have keys, are
        its own, too. It reads one of its own at least, and those that are scored."""
        held = [*other.branch.token_ids, *other.said.tokens][: other.own_tokens]
        own = self.branch.token_ids[: -1 - self.branch.scored]
        pairs = zip(held, own, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class Size:
    """How much room there is. `widths`: tokens of a prefix, and of a branch."""

    slots: int
    rows: int
    widths: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.slots * self.widths[0] + self.rows * self.widths[1]

    def holds(self, other: "Size") -> bool:
        return self.with_at_least(other) == self

    def with_at_least(self, other: "Size") -> "Size":
        (prefix, branch), (other_prefix, other_branch) = self.widths, other.widths
        widths = max(prefix, other_prefix), max(branch, other_branch)
        return Size(max(self.slots, other.slots), max(self.rows, other.rows), widths)


@dataclass
class Live:
    """The jobs in slots and the rows at work. `tokens`: [rows] the latest token of each.

    `continuing`: those of the rows that have taken one over, and are to be read next.
    `missed_rounds`: what those that wait would have gained by now in other room. `is_closing`:
    nothing more is taken from the queue, so that there can be (`room.py`). `is_largest`: the device
    has no memory for more.
    """

    prefixes: KVArena
    branches: KVArena
    tokens: torch.Tensor
    jobs: list[Job] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    continuing: deque[Row] = field(default_factory=deque)
    missed_rounds: float = 0.0
    is_closing: bool = False
    is_largest: bool = False

    @classmethod
    def empty(cls, shape: Shape, size: Size) -> "Live":
        return cls(
            prefixes=KVArena(shape, capacity=size.slots, width=size.widths[0]),
            branches=KVArena(shape, capacity=size.rows, width=size.widths[1]),
            tokens=torch.zeros(size.rows, dtype=torch.long, device=shape.device),
        )

    @property
    def size(self) -> Size:
        widths = self.prefixes.width, self.branches.width
        return Size(self.prefixes.capacity, self.branches.capacity, widths)

    @property
    def free_slots(self) -> int:
        return self.prefixes.capacity - len(self.jobs)

    @property
    def free_rows(self) -> int:
        return self.branches.capacity - len(self.rows)

    @property
    def at_work(self) -> set[Job]:
        return {*self.jobs, *(row.job for row in self.rows)}

    def fits(self, job: Job) -> bool:
        """Whether slots and rows are wide enough."""
        return (
            job.prefix_tokens <= self.prefixes.width and job.most_own_tokens <= self.branches.width
        )

    def fits_whole(self, job: Job) -> bool:
        """Whether it needs no slot."""
        return job.whole_tokens is not None and job.whole_tokens <= self.branches.width

    def places_for(self, jobs: Iterable[Job]) -> int:
        """How many rows of the first ones could be at work at once, if nothing else were."""
        slots, rows = self.prefixes.capacity, 0
        for job in jobs:
            if not self.fits_whole(job):
                if not slots or not self.fits(job):
                    break
                slots -= 1
            rows += len(job.waiting)
            if rows >= self.branches.capacity:
                return self.branches.capacity
        return rows

    def holds(self, row: Row) -> bool:
        """Whether rows are wide enough for one that needs a slot."""
        return row.most_tokens <= self.branches.width

    def take_in(self, job: Job, rows: Sequence[Row]) -> None:
        """Give a job its slot, and its rows their places, where they have none yet."""
        if job.slot == NOWHERE:
            if self.fits_whole(job):
                rows[0].is_whole = True
            else:
                job.slot = len(self.jobs)
                self.jobs.append(job)
        for row in rows:
            if row.kept is None:
                self._append(row)

    def _append(self, row: Row) -> None:
        row.index = len(self.rows)
        self.rows.append(row)
        row.job.live += 1

    def put_back(self, job: Job, rows: Sequence[Row], *, with_prefix: bool) -> None:
        """Undo the latest `take_in`. What has been written since may be anything."""
        job.may_be_poisoned = True
        for row in reversed([row for row in rows if row.kept is None]):
            assert self.rows.pop() is row
            self.branches.clear(row.index)
            row.index = NOWHERE
            row.is_whole = False
            job.live -= 1
        if with_prefix and job.slot != NOWHERE:
            assert self.jobs.pop() is job
            self.prefixes.clear(job.slot)
            job.slot = NOWHERE

    def go_on(self, row: Row, over: Row) -> bool:
        """Give a row the place of one that is over, or a copy of its keys if that has been taken;
        false where there is no room."""
        kept, place = row.kept_of(over), over.index
        if not self.holds(row):
            return False
        if self.rows[place] is over:
            self.rows[place], row.index = row, place
        elif kept and self.free_rows:
            self._append(row)
            self.branches.move(place, row.index, tokens=kept)
        else:
            return False
        row.kept = kept
        self.continuing.append(row)
        return True

    def say(self, rows: Sequence[Row], tokens: torch.Tensor) -> None:
        """Note the latest token [rows] of each."""
        places, first = [row.index for row in rows], rows[0].index
        if places == list(range(first, first + len(rows))):
            self.tokens[first : first + len(rows)] = tokens
        else:
            self.tokens[sent(torch.tensor(places), tokens.device)] = tokens

    def remove(self, row: Row) -> None:
        """Take a row out, and its job with the last one."""
        place, last = row.index, self.rows.pop()
        if row.job.may_be_poisoned:
            self.branches.clear(place)
        if last is not row:
            self.branches.move(last.index, place, tokens=last.own_tokens)
            self.tokens[place] = self.tokens[last.index]
            self.rows[place] = last
            last.index = place
        row.index = NOWHERE
        row.job.live -= 1
        self.let_go(row.job)

    def let_go(self, job: Job) -> None:
        """Take a job out if nobody needs its slot any more."""
        if job.slot != NOWHERE and not job.live and not job.waiting:
            self.remove_job(job)

    def remove_job(self, job: Job) -> None:
        """Take out a job that has no rows."""
        place, last = job.slot, self.jobs.pop()
        if job.may_be_poisoned:
            self.prefixes.clear(place)
        if last is not job:
            self.prefixes.move(last.slot, place, tokens=last.prefix_tokens)
            if last.may_be_poisoned:
                self.prefixes.clear(last.slot)
            self.jobs[place] = last
            last.slot = place
        job.slot = NOWHERE

    def free(self) -> None:
        """Give up the memory, whoever still holds this."""
        self.prefixes.free()
        self.branches.free()

    def resized(self, shape: Shape, size: Size) -> "Live":
        """The same with more room; what is at work is copied."""
        other = Live.empty(shape, size)
        other.prefixes.copy(self.prefixes, sequences=len(self.jobs))
        other.branches.copy(self.branches, sequences=len(self.rows))
        other.tokens[: len(self.rows)] = self.tokens[: len(self.rows)]
        other.jobs, other.rows, other.continuing = self.jobs, self.rows, self.continuing
        return other
