"""How many failed rows a job puts up with: `max_failed_fraction`, at its end and before it."""

from dataclasses import dataclass

from pipeline.footer import Tally

LEAST_ANSWERS = 1000
"""So many have to be there before a run is ended because of those that failed."""


@dataclass(frozen=True)
class Tolerance:
    """`most_answers`: of the whole table, once it is complete; null where that is not known."""

    fraction: float
    most_answers: int | None

    def is_exceeded(self, tally: Tally) -> bool:
        return self._allows_no_more(tally, of=tally.rows)

    def is_hopeless(self, tally: Tally) -> bool:
        """Whether a complete table will exceed it, as far as is known by now.

        Where nobody knows how many answers there will be, those that are there have to do.
        """
        whole = max(tally.rows, self.most_answers or 0)
        return tally.rows >= LEAST_ANSWERS and self._allows_no_more(tally, of=whole)

    def told(self, tally: Tally) -> str:
        """Why a run was ended early, and what to do."""
        return (
            f"stopped early: {tally.counts['failed']:,} of {tally.rows:,} answers are failed, more "
            f"than max_failed_fraction {self.fraction:g} allows; see above why. To have these rows "
            "answered, mend that and give another output.path; to go on without them, raise "
            "max_failed_fraction and run the same command again"
        )

    def _allows_no_more(self, tally: Tally, *, of: int) -> bool:
        return tally.counts["failed"] > self.fraction * of
