"""What is read in the next pass: what goes on in its row, then what waits, in the order it came."""

from pipeline.engine.live import NOWHERE, Job, Live, Row
from pipeline.engine.prompts import Filling


class Picking:
    """Rows for one pass of about `most_tokens`, as far as there are places."""

    def __init__(self, live: Live, *, most_tokens: int) -> None:
        self._live, self._most_tokens = live, most_tokens
        self._tokens, self._slots, self._rows = 0, live.free_slots, live.free_rows
        self._picked: dict[Job, list[Row]] = {}
        while live.continuing and self._tokens < most_tokens:
            row = live.continuing.popleft()
            self._picked.setdefault(row.job, []).append(row)
            self._tokens += len(row.unread)

    @property
    def fillings(self) -> list[Filling]:
        return [Filling(job, rows) for job, rows in self._picked.items()]

    def take(self, job: Job) -> bool:
        """Pick what of the job there is room for; false where nobody behind it may have any."""
        if not self._rows or self._tokens >= self._most_tokens:
            return False
        is_new = job.slot == NOWHERE
        if is_new and not self._live.fits_whole(job):
            if not self._slots or not self._live.fits(job):
                return False
            self._slots -= 1
        self._tokens += job.prefix_tokens if is_new else 0
        rows: list[Row] = []
        while job.waiting and self._rows and (not rows or self._tokens < self._most_tokens):
            if not is_new and not self._live.holds(job.waiting[0]):
                break
            rows.append(job.waiting.popleft())
            self._tokens += len(rows[-1].branch.token_ids)
            self._rows -= 1
        if rows:
            self._picked.setdefault(job, []).extend(rows)
        return True
