import gzip
import json
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commit import AnswerTable, write_run_record
from pipeline.coverage import Ranges
from pipeline.footer import Fingerprint
from pipeline.ledger import LEDGER, UNRECORDED_PARTS
from pipeline.parts import PartInfo, read_info
from pipeline.sources.base import Shard
from pipeline.storage import Output
from schemas.errors import JobError, OutputHeld, SpecError
from schemas.job import OutputSpec, StorageSpec
from schemas.tables import SCHEMA_VERSION
from tests.answered import FINGERPRINT, IDENTITY, FreeLease, end, failed, identities, row
from tests.committing import SHARDS, Run
from tests.s3 import S3Server


def test_staged_parts_fill_files_of_rows_per_file(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=4)
    for first in range(0, 12, 2):
        run.write(row(first), row(first + 1))
        run.table.fold()
    assert sorted(pq.read_metadata(f).num_rows for f in tmp_path.glob("answers/*")) == [4, 4, 4]
    assert run.files("staging") == []


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 64])
def test_files_hold_exactly_rows_per_file_and_the_last_the_rest(tmp_path: Path, batch: int) -> None:
    run = Run(tmp_path, rows_per_file=10)
    for first in range(0, 64, batch):
        run.write(*(row(index) for index in range(first, min(first + batch, 64))))
        run.table.fold()
    run.table.finish()
    sizes = sorted(pq.read_metadata(f).num_rows for f in tmp_path.glob("answers/*"))
    assert sizes == [4, 10, 10, 10, 10, 10, 10]
    assert run.table.tally.rows == 64
    assert run.files("staging") == run.files("intents") == []


def test_the_answers_of_one_source_row_stay_in_one_file(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=4)
    own = ["o-1", "o-2", "o-3"]
    run.write(*(row(index, own, units=["questions"]) for index in range(3)), end(3))
    run.write(row(3, [*own, "o-4", "o-5"], units=["questions"]))
    run.table.finish()
    assert sorted(pq.read_metadata(f).num_rows for f in tmp_path.glob("answers/*")) == [3, 3, 3, 5]
    assert len(set(identities(tmp_path))) == 14


def test_a_part_that_is_folded_in_part_is_known_exactly_after_a_restart(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=4)
    run.write(*(row(index) for index in range(6)), failed(6, ["caption"]), end(7))
    run.table.fold()
    assert len(run.files("staging")) == 1
    again = Run(tmp_path, rows_per_file=4)
    assert again.table.tally.counts == {"ok": 6, "failed": 1, "skipped": 0}
    again.table.finish()
    assert [index for _, index, _ in sorted(identities(tmp_path))] == list(range(7))
    assert again.table.coverage.of("a.tar", IDENTITY).is_complete(["caption"])


class TestLedger:
    """Read instead of the footers of the parts that it names, and only while it fits them."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the parts whose footers are read, as they are."""
        names: list[str] = []

        def read_and_tell(output: Output, name: str) -> PartInfo:
            names.append(name)
            return read_info(output, name)

        monkeypatch.setattr("pipeline.commit.read_info", read_and_tell)
        return names

    @pytest.fixture
    def complete(self, tmp_path: Path) -> Run:
        run = Run(tmp_path, rows_per_file=2)
        run.write(*(row(index) for index in range(5)), failed(5, ["caption"]), end(6))
        run.table.finish()
        return run

    def test_stands_for_all_footers(self, tmp_path: Path, complete: Run, read: list[str]) -> None:
        again = Run(tmp_path)
        assert read == []
        assert again.table.tally == complete.table.tally
        assert list(again.table.coverage) == list(complete.table.coverage)

    def test_footers_of_later_parts_are_read_beside_it(
        self, tmp_path: Path, complete: Run, read: list[str]
    ) -> None:
        ledger = (tmp_path / LEDGER).read_bytes()
        later = Run(tmp_path)
        later.write(row(0, ["colour"]))
        later.table.finish()
        (tmp_path / LEDGER).write_bytes(ledger)
        read.clear()
        again = Run(tmp_path)
        assert len(read) == 1
        assert again.table.tally == later.table.tally

    def test_a_part_that_is_gone_makes_it_worthless(
        self, tmp_path: Path, complete: Run, read: list[str]
    ) -> None:
        name = complete.files("answers")[0]
        (tmp_path / name).unlink()
        again = Run(tmp_path)
        assert len(read) == 2
        assert again.table.tally.rows == 4

    @pytest.mark.parametrize(
        "data", [b"", b"no gzip", *(gzip.compress(text, mtime=0) for text in (b"{", b"[]"))]
    )
    def test_a_damaged_one_is_no_ledger(
        self, tmp_path: Path, complete: Run, read: list[str], data: bytes
    ) -> None:
        (tmp_path / LEDGER).write_bytes(data)
        assert Run(tmp_path).table.tally == complete.table.tally
        assert len(read) == 3

    def test_says_what_decided_the_answers(self, tmp_path: Path, complete: Run) -> None:
        other = Fingerprint({"weights": "w2", "dtype": "float32"}, FINGERPRINT.questions)
        with pytest.raises(SpecError, match="model weights: was 'w1', is now 'w2'"):
            Run(tmp_path, fingerprint=other)

    def test_is_written_in_the_middle_of_a_long_run(self, tmp_path: Path) -> None:
        run = Run(tmp_path, rows_per_file=1)
        for index in range(UNRECORDED_PARTS + 2):
            run.write(row(index))
            run.table.fold()
        assert (tmp_path / LEDGER).exists()


def test_a_damaged_intent_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "intents").mkdir(parents=True)
    (tmp_path / "intents/00000001-000001.json").write_text("{}")
    with pytest.raises(JobError, match=r"intents/00000001-000001.json: is damaged .* remove"):
        Run(tmp_path)


def test_nothing_is_published_once_the_lease_is_lost(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))

    def lost() -> None:
        raise OutputHeld("another has it")

    run.lease.check = lost
    with pytest.raises(OutputHeld):
        run.table.finish()
    assert run.files("answers") == []
    again = Run(tmp_path)
    again.table.finish()
    assert len(identities(tmp_path)) == 1


def test_less_than_a_file_stays_staged_until_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=4)
    run.write(row(0))
    run.table.fold()
    assert run.files("answers") == []
    run.table.finish()
    assert identities(tmp_path) == [("a.tar", 0, "caption")]
    assert run.files("staging") == []


def test_rows_lie_by_shard_and_row_and_then_as_asked(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=100, on_change="keep")
    run.write(row(1, ["z-own", "b-own"], units=["questions"]), row(0, uri="b.tar"))
    run.write(row(1, ["colour"]), row(0))
    run.write(row(1, ["caption"]))
    run.table.finish()
    assert identities(tmp_path) == [
        ("a.tar", 0, "caption"),
        ("a.tar", 1, "caption"),
        ("a.tar", 1, "colour"),
        ("a.tar", 1, "z-own"),
        ("a.tar", 1, "b-own"),
        ("b.tar", 0, "caption"),
    ]


def test_a_new_run_knows_what_is_folded_and_what_is_staged(tmp_path: Path) -> None:
    first = Run(tmp_path, rows_per_file=2)
    first.write(row(0), row(1))
    first.table.fold()
    first.write(failed(2, ["caption"]), end(4))
    second = Run(tmp_path)
    shard = second.table.coverage.of("a.tar", IDENTITY)
    assert shard.units == {"caption": Ranges(((0, 3),))}
    assert shard.rows_total == 4
    assert second.table.tally.counts == {"ok": 2, "failed": 1, "skipped": 0}
    assert second.table.tally.failures["ImageCorrupt"].message == "bad 2"
    second.table.finish()
    assert sorted(i for _, i, _ in identities(tmp_path)) == [0, 1, 2]
    assert Run(tmp_path).table.tally == second.table.tally


def test_an_empty_shard_is_known_to_be_complete(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(end(0))
    run.table.finish()
    again = Run(tmp_path)
    assert again.table.coverage.of("a.tar", IDENTITY).is_complete(["caption"])
    assert identities(tmp_path) == []


def test_opening_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))
    before = sorted(tmp_path.rglob("*"))
    AnswerTable(run.spec, keep={}, fingerprint=FINGERPRINT).open(SHARDS)
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_between_publishing_and_removing_leaves_nothing_doubled(tmp_path: Path) -> None:
    run = Run(tmp_path)
    name = run.write(row(0), row(1), end(2))
    staged = (tmp_path / name).read_bytes()
    run.table.finish()
    (tmp_path / name).write_bytes(staged)
    again = Run(tmp_path)
    assert again.table.tally.counts["ok"] == 2
    again.table.finish()
    assert len(identities(tmp_path)) == 2
    assert again.files("staging") == []


def test_a_part_whose_receipt_never_came_is_folded_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stage(row(0))
    run.table.finish()
    assert identities(tmp_path) == [("a.tar", 0, "caption")]


def test_a_part_that_is_staged_again_after_its_fold_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path, rows_per_file=1)
    for _ in range(2):
        run.write(row(0))
        run.table.fold()
    run.table.finish()
    assert identities(tmp_path) == [("a.tar", 0, "caption")]
    assert run.files("staging") == []
    assert run.table.tally.rows == 1


@pytest.mark.parametrize("rows_per_file", [2, 100])
def test_rows_that_two_parts_cover_are_kept_once(tmp_path: Path, rows_per_file: int) -> None:
    run = Run(tmp_path, rows_per_file=rows_per_file)
    run.write(row(0, ["caption", "colour"]), row(1, answer="first"))
    run.table.fold()
    run.write(row(1, answer="second"), row(2, ["o-1", "o-2"], units=["questions"]), end(3))
    run.table.finish()
    assert sorted((i, q) for _, i, q in identities(tmp_path)) == [
        (0, "caption"),
        (0, "colour"),
        (1, "caption"),
        (2, "o-1"),
        (2, "o-2"),
    ]
    assert run.table.tally.counts["ok"] == 5
    table = pa.concat_tables(pq.read_table(f) for f in tmp_path.glob("answers/*"))
    assert "second" not in table["answer"].to_pylist()


def test_an_unreadable_row_has_one_answer_though_questions_are_added(tmp_path: Path) -> None:
    for units in (["caption"], ["colour"]):
        run = Run(tmp_path)
        run.write(failed(0, units=units))
        run.table.finish()
    assert identities(tmp_path) == [("a.tar", 0, None)]
    shard = Run(tmp_path).table.coverage.of("a.tar", IDENTITY)
    assert shard.missing_units(0, ["caption", "colour"]) == []


def test_a_row_that_a_retry_could_not_read_keeps_its_answers(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))
    run.write(failed(0), row(1))
    run.table.finish()
    assert identities(tmp_path) == [("a.tar", 0, "caption"), ("a.tar", 1, "caption")]


def test_another_model_is_refused_by_name_and_value(tmp_path: Path) -> None:
    Run(tmp_path).write(row(0))
    other = Fingerprint({"weights": "w2", "dtype": "float32"}, FINGERPRINT.questions)
    with pytest.raises(SpecError) as error:
        Run(tmp_path, fingerprint=other)
    assert "model weights: was 'w1', is now 'w2'." in str(error.value)
    assert "Run it with --fork NEW_DST" in str(error.value)


def test_a_changed_question_is_refused_and_an_added_one_is_not(tmp_path: Path) -> None:
    Run(tmp_path).write(row(0))
    asked = FINGERPRINT.questions
    Run(tmp_path, fingerprint=Fingerprint(FINGERPRINT.model, {**asked, "new": "n1"}))
    with pytest.raises(SpecError, match="question 'caption': was 'c1', is now 'c2'"):
        Run(tmp_path, fingerprint=Fingerprint(FINGERPRINT.model, {**asked, "caption": "c2"}))


@pytest.mark.parametrize("is_folded", [True, False])
def test_a_table_of_another_schema_version_is_refused_with_a_remedy_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folded: bool
) -> None:
    run = Run(tmp_path)
    name = run.write(row(0), failed(1, ["caption"]), end(2))
    if is_folded:
        run.table.finish()
        (name,) = run.files("answers")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    monkeypatch.setattr("pipeline.footer.SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with pytest.raises(JobError) as error:
        Run(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/{name}: footer version {SCHEMA_VERSION}, this lavaflow reads "
        f"{SCHEMA_VERSION + 1}; use the lavaflow that wrote it, or another output.path"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == files
    monkeypatch.undo()
    assert Run(tmp_path).table.tally.rows == 2


def test_other_columns_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))
    other = AnswerTable(run.spec, keep={"url": pa.string()}, fingerprint=FINGERPRINT)
    with pytest.raises(SpecError, match="url: was None, is now string"):
        other.open(SHARDS)


def test_the_name_of_a_lists_items_is_no_difference(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))
    other = AnswerTable(run.spec, keep={"url": pa.string()}, fingerprint=FINGERPRINT)
    with pytest.raises(SpecError) as error:
        other.open(SHARDS)
    assert "choice_probs" not in str(error.value)


def with_question(unit: str) -> Fingerprint:
    return Fingerprint(FINGERPRINT.model, {**FINGERPRINT.questions, unit: "new"})


@pytest.mark.parametrize("is_folded", [True, False])
def test_a_question_under_the_id_of_a_rows_own_is_refused(tmp_path: Path, is_folded: bool) -> None:
    run = Run(tmp_path)
    run.write(row(0, ["own", "shape"], units=["questions"]), row(1, ["x"], units=["questions"]))
    if is_folded:
        run.table.finish()
    Run(tmp_path, fingerprint=with_question("form"))
    with pytest.raises(SpecError) as error:
        Run(tmp_path, fingerprint=with_question("shape"))
    told = f"the id 'shape' is already used by rows' own questions in {tmp_path}; give the question"
    assert str(error.value) == f"{told} another id. One of them is a.tar row 0"


def test_an_id_of_rows_own_is_found_though_other_rows_answer_a_question_of_that_id(
    tmp_path: Path,
) -> None:
    """Asked, dropped from the spec, asked again; meanwhile a fold made one part of both."""
    run = Run(tmp_path, fingerprint=with_question("shape"))
    run.write(row(0, ["shape", None], units=["shape", "questions"], status="skipped", answer=None))
    dropped = Run(tmp_path)
    dropped.write(row(1, ["shape"], units=["questions"]))
    dropped.table.finish()
    with pytest.raises(SpecError, match=r"One of them is a.tar row 1"):
        Run(tmp_path, fingerprint=with_question("shape"))


def test_an_added_question_that_is_half_answered_is_asked_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(*(row(index, ["own"], units=["questions"]) for index in range(3)))
    added = Run(tmp_path, fingerprint=with_question("shape"))
    added.write(row(0, ["shape"]))
    added.table.finish()
    again = Run(tmp_path, fingerprint=with_question("shape"))
    again.write(row(1, ["shape"]), row(2, ["shape"]))
    again.table.finish()
    assert len(identities(tmp_path)) == len(set(identities(tmp_path))) == 6


def test_rows_are_read_only_where_a_question_is_added_beside_rows_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0, ["caption", "own"], units=["caption", "questions"]), end(2))
    name = run.write(row(1, ["own"], units=["questions"]))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"PAR1" + b"\xff" * 2000 + data[2004:])
    asked = {"questions": FINGERPRINT.questions["questions"]}
    Run(tmp_path, fingerprint=Fingerprint(FINGERPRINT.model, asked))
    with pytest.raises(JobError, match="its rows are damaged"):
        Run(tmp_path, fingerprint=with_question("shape"))


NEXT = [Shard("a.tar", "etag-2"), Shard("b.tar", IDENTITY)]
OTHER = [Shard("a.tar", "etag-2"), Shard("b.tar", "etag-2")]


def of(uri: str, *rows: list[dict], identity: str = IDENTITY) -> list[dict]:
    """These rows, of this version of this shard."""
    place = {"source_uri": uri, "shard_identity": identity}
    return [{**each, **place} for group in rows for each in group]


def answer_both(path: object, **options: object) -> Run:
    """Two shards of three rows, in files that hold rows of both, and one row that is staged."""
    run = Run(path, rows_per_file=4, shards=[Shard("a.tar", IDENTITY), NEXT[1]], **options)
    run.write(of("a.tar", row(0), row(1)), of("b.tar", row(0), row(1)))
    run.table.fold()
    run.write(of("a.tar", row(2), end(3)), of("b.tar", row(2), end(3)))
    return run


@pytest.mark.parametrize("is_folded", [True, False])
def test_answers_to_a_shard_that_has_changed_leave_before_new_ones_appear(
    tmp_path: Path, is_folded: bool
) -> None:
    run = answer_both(tmp_path)
    if is_folded:
        run.table.finish()
    names = run.files("answers")
    changed = Run(tmp_path, shards=NEXT)
    assert changed.removed.rows == (3 if is_folded else 2)
    assert changed.files("answers") == names
    assert {uri for uri, _, _ in identities(tmp_path)} == {"b.tar"}
    assert not changed.table.coverage.of("a.tar", "etag-2").units
    changed.write(of("a.tar", row(0), end(1), identity="etag-2"))
    changed.table.finish()
    assert sorted(identities(tmp_path)) == [
        ("a.tar", 0, "caption"),
        *(("b.tar", index, "caption") for index in range(3)),
    ]
    assert changed.table.tally.rows == 4
    again = Run(tmp_path, shards=NEXT)
    assert again.removed.rows == 0
    assert again.table.tally == changed.table.tally
    assert again.table.coverage.of("a.tar", "etag-2").is_complete(["caption"])


def test_answers_to_a_shard_that_is_gone_leave(tmp_path: Path) -> None:
    answer_both(tmp_path).table.finish()
    without = Run(tmp_path, shards=NEXT[1:])
    without.table.finish()
    assert {uri for uri, _, _ in identities(tmp_path)} == {"b.tar"}
    assert without.table.tally.rows == 3


def test_answers_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    answer_both(tmp_path).table.finish()
    before = {file: file.read_bytes() for file in tmp_path.glob("answers/*")}
    for shards in (NEXT, NEXT[1:], NEXT[:1], [Shard("c.tar", IDENTITY)]):
        run = Run(tmp_path, shards=shards, on_change="keep")
        assert run.removed.rows == 0
        run.table.finish()
        for shard in shards:
            done = run.table.versions.done(shard, run.table.coverage, units=["new"])
            assert done.is_complete(["new"]) == (shard.uri == "a.tar")
    assert {file: file.read_bytes() for file in tmp_path.glob("answers/*")} == before


def test_what_was_not_complete_when_it_changed_is_not_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0))
    run.table.finish()
    changed = Run(tmp_path, shards=NEXT[:1], on_change="keep")
    assert changed.removed.rows == 1
    changed.write(of("a.tar", row(0), end(1), identity="etag-2"))
    changed.table.finish()
    assert changed.table.coverage.of("a.tar", "etag-2").is_complete(["caption"])


def test_another_source_is_refused(tmp_path: Path) -> None:
    run = answer_both(tmp_path)
    run.table.finish()
    with pytest.raises(SpecError) as error:
        Run(tmp_path, shards=[Shard("c.tar", IDENTITY)])
    assert str(error.value) == (
        f"{tmp_path} has answers about 2 shards, none of which is in source.path any more; the "
        "first was a.tar. Give another output.path, or set source.on_change to keep"
    )


def test_a_part_that_lost_all_its_rows_stays_as_a_name_until_the_next_change(
    tmp_path: Path,
) -> None:
    """Its name is taken: whoever was about to publish it finds it there, however late."""
    run = Run(tmp_path, shards=[Shard("a.tar", IDENTITY), NEXT[1]])
    run.write(of("b.tar", row(0), end(1)))
    run.table.finish()
    b = run.files("answers")
    run.write(of("a.tar", row(0), end(1)))
    run.table.finish()
    changed = Run(tmp_path, shards=NEXT)
    assert changed.files("answers") == run.files("answers")
    assert len(identities(tmp_path)) == 1
    changed.write(of("a.tar", row(0), end(1), identity="etag-2"))
    changed.table.finish()
    last = Run(tmp_path, shards=NEXT[1:])
    assert len(last.files("answers")) == 2
    assert set(b) < set(last.files("answers"))
    last.table.finish()
    assert identities(tmp_path) == [("b.tar", 0, "caption")]


def test_a_part_that_somebody_else_changes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    answer_both(tmp_path).table.finish()
    spec = OutputSpec(path=str(tmp_path))
    table = AnswerTable(spec, keep={}, fingerprint=FINGERPRINT)
    lease = FreeLease()
    table.recover(lease)
    table.open(NEXT)
    lease.check = lambda: Run(tmp_path, shards=OTHER) and None
    with pytest.raises(JobError, match=r"answers/part-.* was changed while this run was about"):
        table.remove_stale()
    assert identities(tmp_path) == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/part-x.parquet").write_bytes(b"PAR1")
    with pytest.raises(JobError, match=r"answers/part-x.parquet: is not a whole Parquet file"):
        Run(tmp_path)


def test_a_staged_part_whose_rows_are_damaged_is_named_with_the_remedy(tmp_path: Path) -> None:
    run = Run(tmp_path)
    name = run.write(row(0))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"PAR1" + b"\xff" * 500 + data[504:])
    with pytest.raises(JobError, match=rf"{name}: its rows are damaged .* move it away"):
        run.table.finish()


def test_a_staged_part_that_is_gone_is_noticed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    name = run.write(row(0))
    (tmp_path / name).unlink()
    with pytest.raises(JobError, match="a staged part is gone"):
        run.table.finish()


def test_the_footer_of_a_fold_tells_what_its_rows_are(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(row(0), failed(1, ["caption"], run_id="run-2"), end(3))
    run.write(row(1), row(2))
    run.table.finish()
    (name,) = run.files("answers")
    info = read_info(run.output, name)
    assert name == f"answers/part-{info.footer.key}.parquet"
    assert info.footer.run_ids == ("run-1", "run-2")
    assert info.footer.tally.rows == info.rows == 3
    assert info.footer.shards[0].is_complete(["caption"])


def test_a_run_record_is_replaced_by_a_later_one(tmp_path: Path) -> None:
    output = Output(str(tmp_path), StorageSpec())
    write_run_record(output, "run-1", {"counts": {"ok": 0}})
    write_run_record(output, "run-1", {"counts": {"ok": 3}})
    assert json.loads((tmp_path / "runs/run-1.json").read_text()) == {"counts": {"ok": 3}}


def test_a_run_record_is_there_at_every_moment(tmp_path: Path) -> None:
    output = Output(str(tmp_path), StorageSpec())
    write_run_record(output, "run-1", {"n": 0})
    found, is_over = [], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            try:
                found.append(json.loads((tmp_path / "runs/run-1.json").read_text())["n"])
            except (FileNotFoundError, ValueError) as error:
                found.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in range(300):
        write_run_record(output, "run-1", {"n": n})
    is_over.set()
    watcher.join()
    assert found == sorted(found, key=int)


def test_an_object_store_replaces_a_run_record(s3_server: S3Server) -> None:
    storage = StorageSpec(endpoint_url=s3_server.endpoint_url)
    output = Output(s3_server.url(uuid.uuid4().hex), storage)
    for n in range(2):
        write_run_record(output, "run-1", {"n": n})
    assert json.loads(output.read("runs/run-1.json")) == {"n": 1}


def test_an_object_store_holds_the_same_table(s3_server: S3Server) -> None:
    url = s3_server.url(uuid.uuid4().hex)
    storage = StorageSpec(endpoint_url=s3_server.endpoint_url)
    run = Run(url, rows_per_file=2, storage=storage)
    run.write(row(0), row(1))
    run.table.fold()
    run.write(row(1), row(2), end(3))
    again = Run(url, rows_per_file=2, storage=storage)
    again.table.finish()
    assert again.files("staging") == []
    assert len(again.files("answers")) == 2
    last = Run(url, storage=storage).table
    assert last.tally.counts["ok"] == 3
    assert last.coverage.of("a.tar", IDENTITY).is_complete(["caption"])


ROWS = [
    *(row(i, ["caption", "colour"]) for i in range(4)),
    row(4, ["own-1", "own-2", "own-3"], units=["questions"]),
    failed(5, units=["caption", "colour", "questions"]),
    row(6, ["caption", None], units=["caption", "questions"]),
    end(7),
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, unique=True), max_size=8),
    st.lists(st.booleans(), min_size=10, max_size=10),
    st.integers(1, 12),
)
def test_any_batches_repeated_and_killed_give_every_row_once(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[list[int]],
    killed: list[bool],
    rows_per_file: int,
) -> None:
    """Batches overlap as they like; before each, the driver may forget all that it knew."""
    path = tmp_path_factory.mktemp("run")
    run = Run(path, rows_per_file=rows_per_file)
    for batch, kill in zip([*batches, list(range(len(ROWS)))], killed, strict=False):
        if kill:
            run = Run(path, rows_per_file=rows_per_file)
        run.write(*(ROWS[number] for number in batch))
        run.table.fold()
        visible = identities(path) if run.files("answers") else []
        assert len(visible) == len(set(visible))
    run.table.finish()
    every = [
        (r["source_uri"], r["source_index"], r["question_id"]) for rows in ROWS[:-1] for r in rows
    ]
    assert sorted(identities(path), key=str) == sorted(every, key=str)
    assert run.table.tally.rows == len(every)
    assert run.files("staging") == []
