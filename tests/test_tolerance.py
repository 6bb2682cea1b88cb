"""When a run is ended because of what has failed, and when its end is a failure."""

import pytest

from jobs.tolerance import LEAST_ANSWERS, Tolerance
from pipeline.footer import Tally


def tally(*, ok: int, failed: int) -> Tally:
    return Tally({"ok": ok, "failed": failed, "skipped": 0})


@pytest.mark.parametrize(
    ("ok", "failed", "is_exceeded"), [(95, 5, False), (94, 6, True), (0, 0, False), (0, 1, True)]
)
def test_more_than_the_fraction_is_too_much(ok: int, failed: int, is_exceeded: bool) -> None:
    assert Tolerance(0.05, None).is_exceeded(tally(ok=ok, failed=failed)) == is_exceeded


@pytest.mark.parametrize(
    ("most", "failed", "is_hopeless"),
    [
        (None, 50, False),
        (None, 51, True),
        (10_000, 500, False),
        (10_000, 501, True),
        (10, 51, True),
    ],
)
def test_what_can_still_become_of_a_run_decides(
    most: int | None, failed: int, is_hopeless: bool
) -> None:
    seen = tally(ok=LEAST_ANSWERS - failed, failed=failed)
    assert Tolerance(0.05, most).is_hopeless(seen) == is_hopeless


def test_a_few_answers_decide_nothing() -> None:
    assert not Tolerance(0.05, None).is_hopeless(tally(ok=0, failed=LEAST_ANSWERS - 1))
    assert Tolerance(0.05, None).is_hopeless(tally(ok=0, failed=LEAST_ANSWERS))


def test_the_message_names_what_has_failed_and_what_is_allowed() -> None:
    told = Tolerance(0.05, None).told(tally(ok=900, failed=100))
    assert "100 of 1,000 answers are failed" in told
    assert "max_failed_fraction 0.05" in told
