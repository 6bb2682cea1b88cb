"""Force: a table is replaced part by part; a reader finds every answer, old or new."""

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
OTHER = Fingerprint({"weights": "w2", "dtype": "float32"}, FINGERPRINT.questions)


def forced(path: object, **options: Any) -> Run:
    return Run(path, is_forced=True, **{"fingerprint": OTHER, **options})


def told(run: Run) -> dict[tuple[str, int, str | None], str]:
    """Which run has given each answer; each part is of one fingerprint."""
    parts = [read_part(run.output, name) for name in run.files("answers")]
    rows = [r for table, _ in parts for r in table.to_pylist()]
    found = {(r["source_uri"], r["source_index"], r["question_id"]): r["run_id"] for r in rows}
    assert len(found) == len(rows)
    for table, footer in parts:
        runs = set(table["run_id"].to_pylist())
        assert len(runs) <= 1
        if runs:
            assert (footer.fingerprint.model["weights"] == "w2") == (runs == {"new"})
    return found


def new(index: int, ids: list[str] = BOTH, **columns: Any) -> list[dict[str, Any]]:
    return row(index, ids, **{"run_id": "new", **columns})


@pytest.fixture
def first(tmp_path: Path) -> Run:
    run = Run(tmp_path, rows_per_file=4)
    run.write(*(row(index, BOTH) for index in range(5)), failed(5, units=BOTH), end(6))
    run.table.finish()
    return run


def test_a_part_is_replaced_once_all_of_it_is_answered_anew(first: Run) -> None:
    names = first.files("answers")
    assert len(names) == 3
    run = forced(first.spec.path, rows_per_file=4)
    assert not run.table.coverage.of("a.tar", IDENTITY).units
    run.write(new(0), new(2))
    run.table.fold()
    assert set(told(run).values()) == {"run-1"}
    run.write(new(1), new(3))
    run.table.fold()
    assert [told(run)["a.tar", n, "caption"] for n in range(5)] == ["new"] * 4 + ["run-1"]
    run.write(new(4), new(5), end(6))
    run.table.finish()
    assert set(told(run).values()) == {"new"}
    assert len(told(run)) == 12
    assert run.files("answers") == names
    assert run.files("staging") == []
    later = Run(first.spec.path, fingerprint=OTHER)
    assert later.table.tally == run.table.tally
    assert later.table.coverage.of("a.tar", IDENTITY).is_complete(BOTH)


def test_a_killed_one_is_refused_without_force_and_goes_on_with_it(first: Run) -> None:
    run = forced(first.spec.path, rows_per_file=4)
    run.write(new(0), new(1), new(2))
    run.table.fold()
    for fingerprint in (FINGERPRINT, OTHER):
        with pytest.raises(SpecError, match=r"model weights: was 'w.', is now 'w.'.* with --force"):
            Run(first.spec.path, fingerprint=fingerprint)
    again = forced(first.spec.path, rows_per_file=4)
    known = again.table.coverage.of("a.tar", IDENTITY)
    assert [n for n in range(6) if known.missing_units(n, BOTH)] == [3, 4, 5]
    again.write(new(3), new(4), new(5), end(6))
    again.table.finish()
    assert set(told(again).values()) == {"new"}
    assert len(told(again)) == 12


def test_forced_back_in_the_middle_what_was_staged_for_the_other_way_goes(first: Run) -> None:
    run = forced(first.spec.path, rows_per_file=4)
    run.write(new(0), new(2))
    back = forced(first.spec.path, fingerprint=FINGERPRINT)
    assert back.table.coverage.of("a.tar", IDENTITY).is_complete(BOTH)
    back.table.finish()
    assert back.files("staging") == []
    assert set(told(back).values()) == {"run-1"}


def test_where_a_shard_ends_is_told_by_the_part_that_told_it_however_late(first: Run) -> None:
    names = first.files("answers")
    run = forced(first.spec.path, rows_per_file=4)
    for index in range(6):
        run.write(new(index))
        run.table.fold()
    assert set(told(run).values()) == {"new", "run-1"}
    run.write(end(6))
    run.table.finish()
    assert set(told(run).values()) == {"new"}
    assert run.files("answers") == names
    known = Run(first.spec.path, fingerprint=OTHER).table.coverage.of("a.tar", IDENTITY)
    assert known.is_complete(BOTH)


def test_new_shards_have_parts_of_their_own(first: Run) -> None:
    shards = [Shard("a.tar", IDENTITY), Shard("b.tar", IDENTITY)]
    run = forced(first.spec.path, rows_per_file=4, shards=shards)
    run.write(new(0), new(0, uri="b.tar"), new(1, uri="b.tar"), end(2, uri="b.tar"))
    run.write(*(new(n) for n in range(1, 6)), end(6))
    run.table.finish()
    assert set(told(run).values()) == {"new"}
    assert len(told(run)) == 16
    assert len(run.files("answers")) == 4


def test_what_is_no_longer_asked_or_there_leaves(tmp_path: Path) -> None:
    shards = [Shard("a.tar", IDENTITY), Shard("b.tar", IDENTITY)]
    run = Run(tmp_path, shards=shards)
    run.write(row(0, BOTH), end(1), row(0, BOTH, uri="b.tar"), end(1, uri="b.tar"))
    run.table.finish()
    only = Fingerprint(OTHER.model, {"caption": "c1"})
    after = forced(tmp_path, fingerprint=only, on_change="keep")
    after.write(new(0, ["caption"]), end(1))
    after.table.finish()
    assert told(after) == {("a.tar", 0, "caption"): "new"}


def test_an_answer_for_all_questions_gives_way_though_they_lie_in_two_parts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(failed(0, units=["caption"]), row(1), end(2))
    run.table.finish()
    run.write(failed(0, units=["colour"]), row(1, ["colour"]))
    run.table.finish()
    well = forced(tmp_path)
    well.write(new(0), new(1), end(2))
    well.table.finish()
    places = [("a.tar", n, q) for n in range(2) for q in BOTH]
    assert sorted(told(well)) == places
    ill = forced(tmp_path, fingerprint=FINGERPRINT)
    ill.write(failed(0, units=BOTH, run_id="ill"), row(1, BOTH, run_id="ill"), end(2))
    ill.table.finish()
    assert sorted(told(ill), key=str) == sorted([("a.tar", 0, None), *places[2:]], key=str)


def test_columns_are_replaced_too(first: Run) -> None:
    run = forced(first.spec.path, fingerprint=FINGERPRINT, prompts=True)
    run.write(*(new(n, prompt="USER: what?") for n in range(6)), end(6))
    run.table.finish()
    tables = [read_part(run.output, name)[0] for name in run.files("answers")]
    assert {p for table in tables for p in table["prompt"].to_pylist()} == {"USER: what?"}
