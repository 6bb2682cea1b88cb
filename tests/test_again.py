"""Retry: new answers in the place of failed rows, in the same files, whatever dies in between."""

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.again import Missing
from pipeline.coverage import END, Ranges
from pipeline.footer import NULL_QUESTION, Fingerprint
from pipeline.parts import read_part
from pipeline.sources.base import Shard
from schemas.job import StorageSpec
from schemas.tables import EARLIER_FAILED, NOT_ASKED
from tests.answered import FINGERPRINT, IDENTITY, end, failed, row
from tests.committing import Run
from tests.s3 import S3Server

BOTH = ["caption", "questions"]
SHARD = [Shard("a.tar", IDENTITY)]


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The whole table, in the order in which it lies; each footer fits its rows."""
    parts = [read_part(run.output, name) for name in run.files("answers")]
    for table, footer in parts:
        assert footer.tally.rows == table.num_rows
    return pa.concat_tables([table for table, _ in parts]).to_pylist()


def told(run: Run) -> dict[tuple[int, str | None], tuple[str, int, str]]:
    rows = rows_of(run)
    found = {
        (r["source_index"], r["question_id"]): (r["status"], r["attempts"], r["run_id"])
        for r in rows
    }
    assert len(found) == len(rows)
    return found


def missing(run: Run, *classes: str, but_run: str = "") -> Missing | None:
    return run.table.failed(classes=classes, but_run=but_run).get("a.tar")


def indexes(missing: Missing, unit: str) -> list[int]:
    asked = Ranges.of([(0, 100)]) - missing.done.units[unit]
    return [index for index in range(100) if index in asked]


def again(index: int, ids: list[str | None], **columns: Any) -> list[dict[str, Any]]:
    return row(index, ids, **{"run_id": "again", **columns})


def of_one_row(*rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "row_answers": len(rows)} for (each,) in rows]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Rows with a failed caption, failed questions of their own, and nothing but a failure."""
    run = Run(tmp_path, rows_per_file=4)
    run.write(
        row(0, ["caption", "own"], units=BOTH),
        of_one_row(
            failed(1, ["caption"], units=BOTH),
            failed(1, ["o-1"], units=BOTH, error_class="NonFiniteLogits"),
            row(1, ["o-2"], units=BOTH),
        ),
        failed(2, units=BOTH, error_class="ImageMissing"),
        of_one_row(
            row(3, ["caption"], units=BOTH),
            failed(3, units=BOTH, error_class="QuestionsMalformed"),
        ),
        row(4, ["caption", "own"], units=BOTH),
        end(5),
    )
    run.table.finish()
    return run


def test_exactly_what_failed_is_asked_again(run: Run) -> None:
    found = missing(run)
    assert found
    assert indexes(found, "caption") == [1, 2]
    assert indexes(found, "questions") == [1, 2, 3]
    assert found.own == {1: frozenset({"o-1"})}
    assert indexes(found, "colour") == []
    assert found.end == END


@pytest.mark.parametrize(
    ("name", "caption", "questions"),
    [
        ("ImageCorrupt", [1], []),
        ("NonFiniteLogits", [], [1]),
        ("ImageMissing", [2], [2]),
        ("QuestionsMalformed", [], [3]),
    ],
)
def test_only_the_rows_of_a_class_are_asked_again(
    run: Run, name: str, caption: list[int], questions: list[int]
) -> None:
    found = missing(run, name)
    assert found
    assert indexes(found, "caption") == caption
    assert indexes(found, "questions") == questions
    assert missing(run, "ImageEmpty") is None


def test_new_answers_take_the_place_of_failed_ones_in_the_same_files(run: Run) -> None:
    before, names = told(run), run.files("answers")
    run.write(
        again(1, ["caption", "o-1"], units=BOTH),
        again(2, ["caption", "o-1", "o-2"], units=BOTH),
        failed(3, units=["questions"], error_class="QuestionsMalformed", run_id="again"),
        again=True,
    )
    assert told(run) == before
    run.table.finish()
    assert run.files("answers") == names
    assert run.files("staging") == []
    assert told(run) == {
        (0, "caption"): ("ok", 1, "run-1"),
        (0, "own"): ("ok", 1, "run-1"),
        (1, "caption"): ("ok", 2, "again"),
        (1, "o-1"): ("ok", 2, "again"),
        (1, "o-2"): ("ok", 1, "run-1"),
        (2, "caption"): ("ok", 2, "again"),
        (2, "o-1"): ("ok", 2, "again"),
        (2, "o-2"): ("ok", 2, "again"),
        (3, "caption"): ("ok", 1, "run-1"),
        (3, None): ("failed", 2, "again"),
        (4, "caption"): ("ok", 1, "run-1"),
        (4, "own"): ("ok", 1, "run-1"),
    }
    assert run.table.swapped == 4
    places = [(r["source_index"], r["question_id"] or "") for r in rows_of(run)]
    assert [place for place in places if place[0] in (1, 2)] == sorted(
        place for place in places if place[0] in (1, 2)
    )
    assert missing(run, but_run="again") is None
    assert indexes(missing(run), "questions") == [3]
    later = Run(run.spec.path)
    assert later.table.tally == run.table.tally
    assert later.table.coverage.of("a.tar", IDENTITY).is_complete(BOTH)
    nulls = later.table.coverage.of("a.tar", IDENTITY).units[NULL_QUESTION]
    assert nulls == Ranges(((3, 4),))


def test_attempts_are_counted(run: Run) -> None:
    for attempt in range(2, 5):
        run.write(failed(1, ["caption"], run_id=f"again-{attempt}"), again=True)
        run.table.finish()
        assert told(run)[1, "caption"] == ("failed", attempt, f"again-{attempt}")


def test_what_is_staged_is_not_asked_a_third_time(run: Run) -> None:
    run.write(again(2, ["caption", None], units=BOTH, status="skipped", answer=None), again=True)
    found = missing(run)
    assert indexes(found, "caption") == [1]
    assert told(run)[2, None][0] == "failed"


def test_a_row_that_cannot_be_read_now_fails_for_that_reason(run: Run) -> None:
    lost = {"error_class": "ImageMissing", "error_message": "it is gone", "run_id": "again"}
    run.write(failed(1, units=BOTH, **lost), again=True)
    run.table.finish()
    assert told(run)[1, "caption"] == told(run)[1, "o-1"] == ("failed", 2, "again")
    assert told(run)[1, "o-2"] == ("ok", 1, "run-1")
    (found,) = [r for r in rows_of(run) if (r["source_index"], r["question_id"]) == (1, "o-1")]
    assert (found["error_class"], found["error_message"]) == ("ImageMissing", "it is gone")
    assert found["question"] == "what?"


def test_good_answers_are_never_replaced(run: Run) -> None:
    before = told(run)
    run.write(again(0, ["caption", "own"], units=BOTH), again(4, ["caption"]), again=True)
    run.table.finish()
    assert told(run) == before
    assert run.files("staging") == []


def test_samples_of_a_question_are_replaced_one_by_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    drawn = [row(0, sample_number=n, answer=f"first {n}") for n in range(3)]
    drawn[1] = failed(0, ["caption"], sample_number=1, error_class="NonFiniteLogits")
    run.write(of_one_row(*drawn), end(1))
    run.table.finish()
    new = [again(0, ["caption"], sample_number=n, answer=f"second {n}") for n in range(3)]
    run.write(of_one_row(*new), again=True)
    run.table.finish()
    found = [(r["sample_number"], r["answer"], r["attempts"]) for r in rows_of(run)]
    assert found == [(0, "first 0", 1), (1, "second 1", 2), (2, "first 2", 1)]


def skipped(index: int, ids: list[str | None], **columns: Any) -> list[dict[str, Any]]:
    reason = {"error_stage": "prompt", "error_message": "an answer is missing"}
    return row(index, ids, **{"status": "skipped", "answer": None, **reason, **columns})


def test_what_was_skipped_for_a_failed_answer_is_answered_again_with_it(tmp_path: Path) -> None:
    """Turn by turn; what was not asked for another reason stays as it is."""
    units = ["animal", "breed", "other", "talk"]
    run = Run(tmp_path, fingerprint=Fingerprint(FINGERPRINT.model, dict.fromkeys(units, "q1")))
    run.write(
        of_one_row(
            failed(0, ["animal"], units=units, error_class="NonFiniteLogits"),
            skipped(0, ["breed"], units=units, error_class=EARLIER_FAILED),
            skipped(0, ["other"], units=units, error_class=NOT_ASKED),
            row(0, ["talk"], units=units, turn=0, answer="first"),
            failed(0, ["talk"], units=units, turn=1, error_class="PromptTooLong"),
            skipped(0, ["talk"], units=units, turn=2, error_class=EARLIER_FAILED),
        ),
        of_one_row(
            *(row(1, [unit], units=units) for unit in units[:3]),
            *(row(1, ["talk"], units=units, turn=turn) for turn in range(3)),
        ),
        end(2),
    )
    run.table.finish()
    found = missing(run)
    assert [indexes(found, unit) for unit in units] == [[0], [0], [], [0]]
    of_class = missing(run, "NonFiniteLogits")
    assert [indexes(of_class, unit) for unit in units] == [[0], [0], [], [0]]
    assert missing(run, "ImageMissing") is None
    asked = ["animal", "breed", "talk"]
    run.write(
        of_one_row(
            *(again(0, [unit], units=asked, answer="second") for unit in asked[:2]),
            *(again(0, ["talk"], units=asked, turn=t, answer="second") for t in range(3)),
        ),
        again=True,
    )
    run.table.finish()
    rows = [r for r in rows_of(run) if r["source_index"] == 0]
    assert [(r["question_id"], r["turn"], r["answer"], r["attempts"]) for r in rows] == [
        ("animal", 0, "second", 2),
        ("breed", 0, "second", 2),
        ("other", 0, None, 1),
        ("talk", 0, "first", 1),
        ("talk", 1, "second", 2),
        ("talk", 2, "second", 2),
    ]
    assert missing(run) is None


def test_answers_of_questions_added_later_lie_in_other_files(tmp_path: Path) -> None:
    """The failed row that stands for all of them lies in the first."""
    run = Run(tmp_path)
    run.write(failed(0, units=["caption"]), row(1), end(2))
    run.table.finish()
    run.write(failed(0, units=["colour"]), row(1, ["colour"]))
    run.table.finish()
    assert indexes(missing(run), "colour") == indexes(missing(run), "caption") == [0]
    run.write(again(0, ["caption", "colour"]), again=True)
    run.table.finish()
    assert told(run)[0, "colour"] == told(run)[0, "caption"] == ("ok", 2, "again")
    assert len(run.files("answers")) == 2
    assert missing(Run(tmp_path)) is None


def broken_off(path: object, **output: Any) -> Run:
    run = Run(path, **output)
    run.write(row(0), failed(1, error_class="ShardUnreadable"), end(2))
    run.table.finish()
    return run


def test_a_shard_that_had_broken_off_is_read_to_its_end(tmp_path: Path) -> None:
    run = broken_off(tmp_path)
    found = missing(run)
    assert found.end == 1
    assert 0 in found.done.answered_rows(["caption"])
    assert not any(index in found.done.answered_rows(["caption"]) for index in range(1, 9))
    run.write(*(again(index, ["caption"]) for index in range(1, 4)), end(4), again=True)
    run.table.finish()
    assert told(run) == {
        (0, "caption"): ("ok", 1, "run-1"),
        (1, "caption"): ("ok", 2, "again"),
        (2, "caption"): ("ok", 1, "again"),
        (3, "caption"): ("ok", 1, "again"),
    }
    shard = Run(tmp_path).table.coverage.of("a.tar", IDENTITY)
    assert shard.rows_total == 4
    assert shard.is_complete(["caption"])


def test_of_a_shard_that_is_longer_than_it_seemed_nothing_is_forgotten(tmp_path: Path) -> None:
    """The retry ends when it has answered the row that was the last, and none behind it."""
    run = broken_off(tmp_path)
    run.write(again(1, ["caption"]), again=True)
    run.table.finish()
    shard = Run(tmp_path).table.coverage.of("a.tar", IDENTITY)
    assert shard.rows_total is None
    assert not shard.is_complete(["caption"])


def test_a_shard_that_still_breaks_off_keeps_its_end(tmp_path: Path) -> None:
    run = broken_off(tmp_path)
    run.write(failed(1, error_class="ShardUnreadable", run_id="again"), end(2), again=True)
    run.table.finish()
    assert Run(tmp_path).table.coverage.of("a.tar", IDENTITY).is_complete(["caption"])


def test_the_end_of_a_shard_is_forgotten_wherever_it_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0), failed(1, error_class="ShardUnreadable"))
    run.table.finish()
    run.write(end(2))
    run.table.finish()
    run.write(again(1, ["caption"]), again=True)
    run.table.finish()
    assert Run(tmp_path).table.coverage.of("a.tar", IDENTITY).rows_total is None


@pytest.mark.parametrize("is_retry", [True, False])
def test_whoever_comes_next_does_what_a_killed_retry_has_left(run: Run, is_retry: bool) -> None:
    run.write(again(1, ["caption"]), again=True)
    run.stage(again(2, ["caption", "own"], units=BOTH), again=True)
    later = Run(run.spec.path)
    if is_retry:
        assert indexes(missing(later), "caption") == []
    later.table.replace_failed()
    later.table.finish()
    assert told(later)[1, "caption"] == told(later)[2, "own"] == ("ok", 2, "again")
    assert later.files("staging") == []


def test_answers_to_a_version_that_is_no_more_take_nobodys_place(run: Run) -> None:
    run.stage(again(1, ["caption"]), again=True)
    changed = Run(run.spec.path, shards=[Shard("a.tar", "etag-2")])
    changed.table.replace_failed()
    changed.table.finish()
    assert changed.files("staging") == []
    assert rows_of(changed) == []


def test_on_an_object_store(s3_server: S3Server) -> None:
    storage = StorageSpec(endpoint_url=s3_server.endpoint_url)
    run = Run(s3_server.url(uuid.uuid4().hex), storage=storage)
    run.write(row(0), failed(1), end(2))
    run.table.finish()
    names = run.files("answers")
    run.write(again(1, ["caption"]), again=True)
    run.table.finish()
    assert told(run)[1, "caption"] == ("ok", 2, "again")
    assert run.files("answers") == names


def test_kept_columns_and_times_are_those_of_the_new_answer(run: Run) -> None:
    run.write(again(1, ["caption"], answer="new", mean_logprob=-1.5), again=True)
    run.table.finish()
    (found,) = [r for r in rows_of(run) if (r["source_index"], r["question_id"]) == (1, "caption")]
    assert (found["answer"], found["mean_logprob"], found["error_class"]) == ("new", -1.5, None)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 7), min_size=1), st.booleans(), st.booleans()), max_size=5
    ),
    st.integers(1, 9),
)
def test_any_retries_repeated_and_killed_leave_every_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    retries: list[tuple[set[int], bool, bool]],
    rows_per_file: int,
) -> None:
    """Each retry answers some rows again, well or not; before it ends, all may be forgotten."""
    path = tmp_path_factory.mktemp("run")
    run = Run(path, rows_per_file=rows_per_file)
    run.write(*(failed(n, units=["caption"]) if n % 2 else row(n) for n in range(8)), end(8))
    run.table.finish()
    expected = {n: ("failed" if n % 2 else "ok", 1) for n in range(8)}
    for number, (places, is_well, is_killed) in enumerate(retries):
        make = again if is_well else failed
        ids = ["caption"] if is_well else [None]
        rows = [make(n, ids, units=["caption"], run_id=f"again-{number}") for n in sorted(places)]
        for _ in range(2):
            run.write(*rows[: 1 + number], again=True)
            run.stage(*rows, again=True)
        if is_killed:
            run = Run(path, rows_per_file=rows_per_file)
        run.table.finish()
        for n in places:
            if expected[n][0] == "failed":
                expected[n] = ("ok" if is_well else "failed", expected[n][1] + 1)
        found = {place[0]: outcome[:2] for place, outcome in told(run).items()}
        assert found == expected
    assert run.files("staging") == []
    files = Path(run.spec.path, "answers").iterdir()
    assert sum(pq.read_metadata(file).num_rows for file in files) == 8
