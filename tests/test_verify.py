import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import answer_ids, verify
from pipeline.commit import AnswerTable
from pipeline.footer import Fingerprint
from pipeline.parts import part_bytes, read_part
from pipeline.sources import open_source
from pipeline.sources.base import Question, Sample
from pipeline.storage import Output
from pipeline.write import write_part
from schemas.ask import GenerateSpec
from schemas.errors import ImageMissing, QuestionsMalformed, SpecError
from schemas.job import JobSpec, StorageSpec
from tests.answered import FINGERPRINT, FreeLease, answered, end, failed, row

Rows = list[dict]


def write_tar(path: Path, samples: list[dict[str, bytes]], *, cut: int = 0) -> None:
    """A tar of samples (suffix -> content); `cut` drops that many bytes from its end."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for index, sample in enumerate(samples):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{index:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(data.getvalue()[: len(data.getvalue()) - cut])


def own(*ids: str) -> bytes:
    return json.dumps({"questions": [{"id": i, "question": f"{i}?"} for i in ids]}).encode()


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    """Two shards: one of every kind of row that `ask` can meet, and one that breaks off."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(
        shards / "a.tar",
        [
            {"jpg": b"x", "json": own("q1", "q2")},
            {"jpg": b"x"},
            {"jpg": b"x", "json": own("caption")},
            {"txt": b"no image"},
        ],
    )
    write_tar(shards / "b.tar", [{"jpg": b"x"}, {"jpg": b"y" * 9000}], cut=10240 + 4000)
    return JobSpec(
        source={"format": "webdataset", "path": str(shards)},
        ask=[{"id": "caption", "prompt": "What?"}, {"from": "questions"}],
        output={"path": str(tmp_path / "out"), "rows_per_file": 5},
    )


def answer_rows(job: JobSpec) -> list[Rows]:
    a, b = (shard.uri for shard in open_source(job.source).list())
    both = ["caption", "questions"]
    return [
        row(0, ["caption", "q1", "q2"], uri=a, units=both),
        row(1, ["caption", None], uri=a, units=both, status="skipped", answer=None),
        failed(2, ["caption", None], uri=a, units=both),
        failed(3, uri=a, units=both, error_class="ImageMissing"),
        end(4, uri=a),
        row(0, ["caption", None], uri=b, units=both),
        failed(1, uri=b, units=both, error_class="ShardUnreadable"),
        end(2, uri=b),
    ]


def answer(job: JobSpec, groups: list[Rows]) -> AnswerTable:
    """Commit the rows as a run does, a part for each source row, of the shards as they are now."""
    identity = {shard.uri: shard.identity for shard in open_source(job.source).list()}
    table = AnswerTable(job.output, keep={}, fingerprint=FINGERPRINT)
    table.recover(FreeLease())
    table.open([], on_change="keep")
    for rows in groups:
        part = answered(
            {**r, "shard_identity": identity.get(r["source_uri"], r["shard_identity"])}
            for r in rows
        )
        table.commit(write_part(part, output=job.output, keep={}, fingerprint=FINGERPRINT))
        table.fold()
    table.finish()
    return table


def parts(job: JobSpec) -> list[Path]:
    return sorted(Path(job.output.path, "answers").iterdir())


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a part and leave its footer."""
    table, footer = read_part(Output(str(file.parent), StorageSpec()), file.name)
    file.write_bytes(part_bytes(change(table), footer))


def test_a_whole_table_is_whole(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    report = verify(job)
    assert report.to_json() == {
        "ok": True,
        "inputs": 11,
        "counts": {"ok": 5, "failed": 4, "skipped": 2},
        "failures": {"ImageCorrupt": 2, "ImageMissing": 1, "ShardUnreadable": 1},
        "missing": {"count": 0, "examples": []},
        "doubled": {"count": 0, "examples": []},
        "unexpected": {"count": 0, "examples": []},
        "faults": [],
        "staged": 0,
    }
    assert len(parts(job)) > 1


def test_an_output_without_answers_misses_all(job: JobSpec) -> None:
    report = verify(job)
    assert not report.ok
    assert report.missing.count == report.inputs == 11
    assert len(report.missing.examples) == 5


def test_a_missing_row_is_named(job: JobSpec) -> None:
    answer(job, answer_rows(job)[1:])
    report = verify(job)
    assert not report.ok
    (uri, *_) = (shard.uri for shard in open_source(job.source).list())
    place = {"source_uri": uri, "source_index": 0, "turn": 0, "sample_number": 0}
    assert report.missing.examples == [{**place, "question_id": q} for q in ("caption", "q1", "q2")]


def sampled(rows: Rows) -> Rows:
    """Two answers where the question is known."""
    several = [
        {**each, "sample_number": number}
        for each in rows
        for number in range(2 if each.get("question_id") else 1)
    ]
    return [{**each, "row_answers": len(several)} for each in several]


def test_each_sample_is_an_answer_of_its_own(job: JobSpec) -> None:
    twice = job.model_copy(update={"generate": GenerateSpec(temperature=1.0, n=2)})
    answer(twice, [sampled(rows) for rows in answer_rows(job)])
    report = verify(twice)
    assert report.ok
    assert report.inputs == 11 + 6
    assert verify(job).unexpected.count == 6


def test_a_sample_that_is_missing_is_named(job: JobSpec) -> None:
    twice = job.model_copy(update={"generate": GenerateSpec(temperature=1.0, n=2)})
    first, *others = [sampled(rows) for rows in answer_rows(job)]
    less = [{**each, "row_answers": len(first) - 1} for each in first[:-1]]
    answer(twice, [less, *others])
    [missing] = verify(twice).missing.examples
    assert (missing["question_id"], missing["sample_number"]) == ("q2", 1)


def test_a_removed_part_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    rows = pq.read_metadata(parts(job)[0]).num_rows
    parts(job)[0].unlink()
    report = verify(job)
    assert not report.ok
    assert report.missing.count == rows


def test_a_doubled_part_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    rows = pq.read_metadata(parts(job)[0]).num_rows
    shutil.copy(parts(job)[0], parts(job)[0].with_name("part-copy.parquet"))
    report = verify(job)
    assert not report.ok
    assert report.doubled.count == rows
    assert report.missing.count == report.unexpected.count == 0


def test_rows_that_nothing_calls_for_are_found(job: JobSpec) -> None:
    a = open_source(job.source).list()[0].uri
    strangers = [row(99, uri=a), row(0, ["other"], uri=a), row(0, uri="gone.tar")]
    answer(job, [*answer_rows(job), *strangers])
    report = verify(job)
    assert not report.ok
    assert report.unexpected.count == 3
    found = {(e["source_uri"], e["source_index"]) for e in report.unexpected.examples}
    assert found == {(a, 99), (a, 0), ("gone.tar", 0)}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"hello", "is no .parquet file"),
        ("part.parquet.tmp", b"PAR1", "is no .parquet file"),
        ("part-x.parquet", b"PAR1", "is not a whole Parquet file"),
    ],
)
def test_a_foreign_file_is_found(job: JobSpec, name: str, content: bytes, reason: str) -> None:
    answer(job, answer_rows(job))
    Path(job.output.path, "answers", name).write_bytes(content)
    report = verify(job)
    assert not report.ok
    (fault,) = report.faults
    assert fault.file == f"answers/{name}"
    assert reason in fault.reason


def test_a_parquet_file_of_somebody_else_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    pq.write_table(pa.table({"x": [1]}), Path(job.output.path, "answers", "x.parquet"))
    (fault,) = verify(job).faults
    assert "has no `lavaflow` footer" in fault.reason


def test_a_truncated_part_is_found_with_the_rows_that_it_held(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    file = parts(job)[0]
    rows = pq.read_metadata(file).num_rows
    file.write_bytes(file.read_bytes()[:-50])
    report = verify(job)
    assert [fault.file for fault in report.faults] == [f"answers/{file.name}"]
    assert report.missing.count == rows


@pytest.mark.parametrize("column", ["source_index", "answer", "model"])
def test_a_part_whose_pages_are_damaged_is_found(job: JobSpec, column: str) -> None:
    answer(job, answer_rows(job))
    file = parts(job)[0]
    data = file.read_bytes()
    group = pq.read_metadata(file).row_group(0)
    chunks = (group.column(n) for n in range(group.num_columns))
    (start,) = (c.data_page_offset for c in chunks if c.path_in_schema == column)
    file.write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
    report = verify(job)
    (fault,) = report.faults
    assert not report.ok
    assert fault.file == f"answers/{file.name}"
    assert "its rows are damaged" in fault.reason


def blanked(table: pa.Table, column: str) -> pa.Table:
    """The table with nothing in one column."""
    place = table.schema.get_field_index(column)
    return table.set_column(place, column, pa.nulls(len(table), table.schema.field(column).type))


def test_an_ok_row_without_an_answer_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    for part in parts(job):
        rewrite(part, lambda table: blanked(table, "answer"))
    report = verify(job)
    assert not report.ok
    wrong = "rows have an answer where status is not ok, or none where it is; the first is {"
    assert {fault.reason[1 : len(wrong) + 2] for fault in report.faults} == {f" {wrong}"}
    assert sum(int(fault.reason[0]) for fault in report.faults) == report.counts["ok"]


def test_an_answer_in_a_row_that_is_not_ok_is_found(job: JobSpec) -> None:
    rows = answer_rows(job)
    rows[3] = [{**rows[3][0], "answer": "red"}]
    answer(job, rows)
    (fault,) = verify(job).faults
    assert fault.reason.startswith("1 rows have an answer where status is not ok")
    assert "'source_index': 3" in fault.reason


@pytest.mark.parametrize("column", ["error_stage", "error_message"])
def test_a_failed_row_that_does_not_say_why_is_found(job: JobSpec, column: str) -> None:
    rows = answer_rows(job)
    rows[3] = [{**rows[3][0], column: None}]
    answer(job, rows)
    report = verify(job)
    (fault,) = report.faults
    assert not report.ok
    assert fault.reason.startswith("1 rows have status failed without all of error_stage")


def test_answers_to_another_version_of_a_shard_are_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    shard = open_source(job.source).list()[1]
    os.utime(shard.uri, (1, 1))
    now = open_source(job.source).list()[1].identity
    report = verify(job)
    assert not report.ok
    assert report.missing.count == report.unexpected.count == 0
    reason = f"answers another version of {shard.uri}: was {shard.identity!r}, is now {now!r}"
    assert {fault.reason for fault in report.faults} == {reason}


def kept(job: JobSpec) -> JobSpec:
    return job.model_copy(update={"source": job.source.model_copy(update={"on_change": "keep"})})


def test_answers_that_are_kept_are_held_against_their_footers(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    a, b = (Path(shard.uri) for shard in open_source(job.source).list())
    os.utime(a, (1, 1))
    b.unlink()
    assert not verify(job).ok
    report = verify(kept(job))
    assert report.ok
    assert report.inputs == 11


@pytest.mark.parametrize(
    ("lost", "named"),
    [((0, "caption"), "caption"), ((0, "q1"), None), ((1, None), None), ((3, None), "caption")],
)
def test_a_kept_answer_that_is_lost_is_found(
    job: JobSpec, lost: tuple[int, str | None], named: str | None
) -> None:
    """Of a row's own questions, nobody knows any more how many there were."""
    answer(job, answer_rows(job))
    a = Path(open_source(job.source).list()[0].uri)
    os.utime(a, (1, 1))
    gone = [lost] if lost != (0, "q1") else [lost, (0, "q2")]
    for part in parts(job):
        rewrite(
            part,
            lambda table: table.filter(
                pa.array(
                    [
                        (r["source_uri"], (r["source_index"], r["question_id"]))
                        not in [(str(a), each) for each in gone]
                        for r in table.to_pylist()
                    ],
                    pa.bool_(),
                )
            ),
        )
    report = verify(kept(job))
    found = {(e["source_index"], e["question_id"]) for e in report.missing.examples}
    assert (lost[0], named) in found


def test_a_kept_answer_that_is_doubled_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    for shard in open_source(job.source).list():
        os.utime(shard.uri, (1, 1))
    rows = pq.read_metadata(parts(job)[0]).num_rows
    shutil.copy(parts(job)[0], parts(job)[0].with_name("part-copy.parquet"))
    assert verify(kept(job)).doubled.count == rows


def test_an_output_that_cannot_be_read_is_a_spec_error(job: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = job.output.model_copy(update={"path": str(tmp_path / "file" / "out")})
    with pytest.raises(SpecError, match=r"file/out cannot be read \(.*; check the path and the"):
        verify(job.model_copy(update={"output": output}))


def test_a_store_without_credentials_is_a_spec_error(
    job: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # A port of its own: s3fs keeps one file system an endpoint, and another test's has credentials.
    storage = StorageSpec(endpoint_url="http://127.0.0.1:1")
    output = job.output.model_copy(update={"path": "s3://nobucket/x", "storage": storage})
    with pytest.raises(SpecError, match="cannot be read"):
        verify(job.model_copy(update={"output": output}))


def test_other_columns_are_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    rewrite(parts(job)[0], lambda table: table.drop_columns(["model"]))
    (fault,) = verify(job).faults
    assert "its columns are" in fault.reason


def test_a_footer_that_does_not_fit_its_rows_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    rewrite(parts(job)[0], lambda table: table.slice(1))
    report = verify(job)
    (fault,) = report.faults
    assert "its footer tells" in fault.reason
    assert report.missing.count == 1


def test_what_is_still_staged_is_found(job: JobSpec) -> None:
    answer(job, answer_rows(job))
    write_part(answered(end(4)), output=job.output, keep={}, fingerprint=FINGERPRINT)
    report = verify(job)
    assert report.staged == 1
    assert not report.ok


def test_an_upload_that_arrives_when_its_second_try_was_folded_is_no_fault(job: JobSpec) -> None:
    groups = answer_rows(job)
    answer(job, groups)
    identity = {shard.uri: shard.identity for shard in open_source(job.source).list()}
    late = answered({**r, "shard_identity": identity[r["source_uri"]]} for r in groups[0])

    def staged(fingerprint: Fingerprint) -> int:
        write_part(late, output=job.output, keep={}, fingerprint=fingerprint)
        report = verify(job)
        (file,) = Path(job.output.path, "staging").iterdir()
        file.unlink()
        assert report.ok == (not report.staged)
        return report.staged

    assert staged(FINGERPRINT) == 0
    assert staged(Fingerprint({"weights": "w2"}, FINGERPRINT.questions)) == 1


def test_an_image_folder_is_one_row_a_file(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"x")
    job = JobSpec(
        source={"format": "images", "path": str(images)},
        ask=[{"id": "caption", "prompt": "What?"}],
        output={"path": str(tmp_path / "out")},
    )
    answer(job, [row(0, uri=str(images / "a.png")), row(0, uri=str(images / "b.png"))])
    assert verify(job).ok


def test_a_file_in_pieces_is_looked_at_once_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.parquet.PIECE_BYTES", 100)
    table = pa.table({"path": [f"gone-{n}.png" for n in range(6)]})
    file = str(tmp_path / "a.parquet")
    pq.write_table(table, file, row_group_size=2)
    job = JobSpec(
        source={"format": "parquet", "path": file},
        ask=[{"id": "caption", "prompt": "What?"}],
        output={"path": str(tmp_path / "out")},
    )
    assert len(open_source(job.source).list()) > 1
    reached = [row(n, uri=file) for n in range(5)]
    answer(job, [*reached, failed(5, ["caption"], uri=file, error_class="ImageMissing")])
    assert verify(job).ok


QUESTIONS = (Question("q1", "?"), Question("q2", "?"))


@pytest.mark.parametrize(
    ("sample", "ids"),
    [
        (Sample(0, "s", questions=QUESTIONS), ["caption", "q1", "q2", "last"]),
        (Sample(0, "s"), ["caption", None, "last"]),
        (Sample(0, "s", questions=()), ["caption", None, "last"]),
        (Sample(0, "s", questions=QuestionsMalformed("no")), ["caption", None, "last"]),
        (Sample(0, "s", questions=(Question("last", "?"),)), ["caption", None, "last"]),
        (Sample(0, "s", questions=QUESTIONS[:1] * 2), ["caption", None, "last"]),
        (Sample(0, "s", questions=QUESTIONS, error=ImageMissing("no")), [None]),
    ],
)
def test_a_source_row_calls_for(sample: Sample, ids: list[str | None]) -> None:
    once = dict.fromkeys(["caption", "questions", "last"], (1, 1))
    assert answer_ids(sample, asked=once) == [(each, 0, 0) for each in ids]
    several = {"caption": (2, 3), "questions": (1, 2), "last": (4, 1)}
    assert answer_ids(sample, asked=several) == [
        (each, turn, number)
        for each in ids
        for turns, samples in [(1, 1) if each is None else several.get(each, (1, 2))]
        for turn in range(turns)
        for number in range(samples)
    ]
