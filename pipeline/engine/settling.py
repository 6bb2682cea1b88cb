"""Outcomes, and what follows from them: a request that grows says what is asked next.

What continues a branch that is over goes on in its row, several in turn or in copies; what else
follows waits for a row.
"""

from collections import deque
from collections.abc import Callable, Sequence

from pipeline.engine.live import Job, Live, Row
from pipeline.engine.request import Answer, Outcome, Score
from schemas.errors import NonFiniteLogits


class Settling:
    """`impossible`: why there can never be room for a row, or null."""

    def __init__(self, impossible: Callable[[Row], Outcome | None]) -> None:
        self._impossible = impossible
        self._failed: list[Job] = []

    def settle(self, row: Row, outcome: Outcome) -> None:
        """A branch that has no row."""
        row.job.waiting += self._grown(row, outcome)
        row.job.settle(row.number, outcome)

    def settle_waiting(self, job: Job, outcome: Outcome) -> None:
        """The same outcome for every branch that has no row yet."""
        while job.waiting:
            self.settle(job.waiting.popleft(), outcome)

    def settle_all(self, finished: Sequence[tuple[Row, Outcome]], live: Live) -> None:
        """Branches whose rows are over."""
        # From the last place on: none that is over is moved to another place.
        finished = sorted(finished, key=lambda each: each[0].index, reverse=True)
        for row, outcome in finished:
            row.job.may_be_poisoned |= isinstance(outcome, NonFiniteLogits)
        self._go_on([each for each in finished if each[0].job.grows], live)
        for row, _ in finished:
            if live.rows[row.index] is row:
                live.remove(row)
        for row, outcome in finished:
            row.job.settle(row.number, outcome)
        if self._failed:
            self._drop_failed(live)

    def _go_on(self, finished: Sequence[tuple[Row, Outcome]], live: Live) -> None:
        over: dict[tuple[Job, int | None], Row] = {
            (row.job, row.number): row
            for row, outcome in finished
            if isinstance(outcome, Answer | Score)
        }
        for row, outcome in finished:
            for grown in self._grown(row, outcome):
                continued = over.get((row.job, grown.branch.continues))
                if continued is None or not live.go_on(grown, continued):
                    row.job.waiting.append(grown)
        for row in over.values():
            if live.rows[row.index] is row and row.branch.continues is not None:
                self._leave_to_sibling(row, live)

    def _leave_to_sibling(self, row: Row, live: Live) -> None:
        """A row that nobody has taken goes to one that waits and continues the same as it has."""
        for sibling in row.job.waiting:
            if sibling.branch.continues == row.branch.continues and live.go_on(sibling, row):
                row.job.waiting.remove(sibling)
                return

    def _grown(self, row: Row, outcome: Outcome) -> list[Row]:
        """What follows a branch that is about to be settled. Where there can be no room, that is
        settled at once, and followed in turn."""
        grown: list[Row] = []
        settled = deque([(row, outcome)])
        while settled and row.job.grows:
            for following in self._following(*settled.popleft()):
                if error := self._impossible(following):
                    settled.append((following, error))
                    row.job.settle(following.number, error)
                else:
                    grown.append(following)
        return [] if row.job.error else grown

    def _following(self, row: Row, outcome: Outcome) -> list[Row]:
        try:
            return row.job.grown(row.number, outcome)
        except Exception as error:  # noqa: BLE001 (raised by the one who waits for it)
            self._failed.append(row.job)
            row.job.fail(error)
            return []

    def _drop_failed(self, live: Live) -> None:
        """What is still at work for nobody."""
        self._failed = []
        live.continuing = deque(row for row in live.continuing if row.job.error is None)
        for row in reversed([row for row in live.rows if row.job.error is not None]):
            live.remove(row)
        for job in [job for job in live.jobs if job.error is not None]:
            live.let_go(job)
