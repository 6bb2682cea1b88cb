"""A fork: another table begins with what still holds of a first one."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.footer import Fingerprint
from pipeline.parts import read_part
from pipeline.sources.base import Shard
from schemas.errors import SpecError
from tests.answered import FINGERPRINT, IDENTITY, end, failed, row
from tests.committing import Run

BOTH = ["caption", "colour"]


def with_(**questions: str) -> Fingerprint:
    return Fingerprint(FINGERPRINT.model, {**FINGERPRINT.questions, **questions})


@pytest.fixture
def first(tmp_path: Path) -> Run:
    run = Run(tmp_path / "first", rows_per_file=2)
    run.write(row(0, BOTH), row(1, BOTH), failed(2, units=BOTH), end(3))
    run.table.finish()
    return run


def forked(first: Run, path: Path, **options: Any) -> Run:
    run = Run(path, **options)
    run.taken = run.table.take_over(first.output)
    return run


def told(run: Run) -> set[tuple[int, str | None, str]]:
    run.table.finish()
    parts = [read_part(run.output, name) for name in run.files("answers")]
    rows = [r for table, _ in parts for r in table.to_pylist()]
    found = {(r["source_index"], r["question_id"], r["run_id"]) for r in rows}
    assert len(found) == len(rows)
    for _, footer in parts:
        assert not footer.fingerprint.differences(run.fingerprint)
    return found


def test_answers_to_questions_that_are_the_same_are_taken_over(first: Run, tmp_path: Path) -> None:
    run = forked(first, tmp_path / "new", fingerprint=with_(colour="k2"))
    assert run.taken.counts == {"ok": 2, "failed": 0, "skipped": 0}
    known = run.table.coverage.of("a.tar", IDENTITY)
    assert known.rows_total == 3
    assert [known.missing_units(n, BOTH) for n in range(3)] == [["colour"], ["colour"], BOTH]
    run.write(row(0, ["colour"], run_id="new"), row(1, ["colour"], run_id="new"))
    run.write(row(2, BOTH, run_id="new"))
    old = {(n, "caption", "run-1") for n in range(2)}
    new = {(0, "colour", "new"), (1, "colour", "new"), *((2, q, "new") for q in BOTH)}
    assert told(run) == old | new
    assert len(told(first)) == 5


def test_all_is_taken_over_where_all_still_holds(first: Run, tmp_path: Path) -> None:
    run = forked(first, tmp_path / "new", fingerprint=with_(added="a"))
    assert run.taken.counts == first.table.tally.counts
    assert run.table.coverage.of("a.tar", IDENTITY).is_complete(BOTH)


def test_nothing_is_taken_twice(first: Run, tmp_path: Path) -> None:
    options = {"fingerprint": with_(colour="k2")}
    forked(first, tmp_path / "new", **options)
    again = forked(first, tmp_path / "new", **options)
    assert again.taken.rows == 0
    again.table.finish()
    last = forked(first, tmp_path / "new", **options)
    assert last.taken.rows == 0
    assert last.table.tally.rows == 2


def test_of_another_model_nothing_holds(first: Run, tmp_path: Path) -> None:
    other = Fingerprint({"weights": "w2", "dtype": "float32"}, FINGERPRINT.questions)
    assert forked(first, tmp_path / "new", fingerprint=other).taken.rows == 0


def test_with_other_columns_nothing_is_taken(first: Run, tmp_path: Path) -> None:
    assert forked(first, tmp_path / "new", prompts=True).taken.rows == 0


def test_of_a_shard_that_has_changed_nothing_holds(first: Run, tmp_path: Path) -> None:
    assert forked(first, tmp_path / "new", shards=[Shard("a.tar", "etag-2")]).taken.rows == 0


def test_a_refusal_names_the_fork(first: Run) -> None:
    with pytest.raises(SpecError) as error:
        Run(first.spec.path, fingerprint=with_(colour="k2"))
    assert str(error.value) == (
        f"{first.spec.path}/answers was answered otherwise: question 'colour': was 'k1', is now "
        "'k2'. Run it with --fork NEW_DST, which starts another table with the answers that still "
        "hold, or with --force, which replaces this one part by part, or put the old value back"
    )
    with pytest.raises(SpecError, match=r"prompt: was None, is now string\. Run it with --fork"):
        Run(first.spec.path, prompts=True)
