import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.coverage import Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION, Failures, Fingerprint, Footer, Tally
from pipeline.parts import RECEIPT, part_bytes, read_info, read_part
from pipeline.storage import Output
from pipeline.write import write_part
from schemas.errors import JobError
from schemas.job import OutputSpec, StorageSpec
from schemas.tables import answer_schema, answered_schema
from tests.answered import FINGERPRINT, IDENTITY, answered, end, failed, row


def write(table: pa.Table, path: Path, **keep: pa.DataType) -> dict:
    """Write a part; its receipt with the footer read from the file itself."""
    receipts = write_part(
        table, output=OutputSpec(path=str(path)), keep=keep, fingerprint=FINGERPRINT
    )
    (receipt,) = receipts.to_pylist()
    footer = read_info(Output(str(path), StorageSpec()), receipt["part"]).footer
    assert footer == Footer.from_bytes(receipt["footer"].encode(), name="receipt")
    return {**receipt, "footer": footer}


def damage_pages(file: Path, column: str) -> None:
    data = file.read_bytes()
    group = pq.read_metadata(file).row_group(0)
    chunks = (group.column(n) for n in range(group.num_columns))
    (start,) = (c.data_page_offset for c in chunks if c.path_in_schema == column)
    file.write_bytes(data[:start] + b"\xff" * 20 + data[start + 20 :])


def test_a_part_has_exactly_the_columns_of_the_answer_table(tmp_path: Path) -> None:
    rows = row(0, **{"keep.url": '"http://x"'})
    receipt = write(answered(rows, url=pa.string()), tmp_path, url=pa.string())
    file = pq.ParquetFile(tmp_path / receipt["part"])
    wanted = answer_schema({"url": pa.string()}, prompts=False)
    assert file.schema_arrow.equals(wanted)
    assert file.read()["url"].to_pylist() == ['"http://x"']


def test_the_footer_tells_coverage_counts_and_failures(tmp_path: Path) -> None:
    table = answered(
        row(0, ["caption", "colour"]),
        row(1, ["mine-1", "mine-2"], units=["questions"]),
        failed(2, units=["caption", "colour"]),
        failed(3, ["caption"]),
        row(4, [None], units=["questions"], status="skipped"),
        end(5),
    )
    footer = write(table, tmp_path)["footer"]
    assert footer.shards == (
        ShardCoverage(
            "a.tar",
            IDENTITY,
            5,
            {
                "caption": Ranges(((0, 1), (2, 4))),
                "colour": Ranges(((0, 1), (2, 3))),
                "questions": Ranges(((1, 2), (4, 5))),
                NULL_QUESTION: Ranges(((2, 3), (4, 5))),
            },
        ),
    )
    assert footer.tally == Tally(
        {"ok": 4, "failed": 2, "skipped": 1}, {"ImageCorrupt": Failures(2, "a.tar", 2, "bad 2")}
    )
    assert footer.run_ids == ("run-1",)
    assert footer.fingerprint == FINGERPRINT


def test_the_end_mark_of_an_empty_shard_is_a_part_without_rows(tmp_path: Path) -> None:
    receipt = write(answered(end(0)), tmp_path)
    assert pq.read_metadata(tmp_path / receipt["part"]).num_rows == 0
    assert receipt["footer"].shards == (ShardCoverage("a.tar", IDENTITY, 0),)


def test_a_batch_without_rows_has_no_receipt_and_no_part(tmp_path: Path) -> None:
    assert RECEIPT.names == ["part", "footer"]
    receipt = write_part(
        pa.table({}), output=OutputSpec(path=str(tmp_path)), keep={}, fingerprint=FINGERPRINT
    )
    assert receipt.equals(RECEIPT.empty_table())
    assert not list(tmp_path.iterdir())


def test_a_retried_write_lands_on_itself(tmp_path: Path) -> None:
    first = write(answered(row(0), row(1)), tmp_path)
    second = write(answered(row(0), row(1)), tmp_path)
    assert second == first
    assert [f"staging/{p.name}" for p in (tmp_path / "staging").iterdir()] == [first["part"]]


def test_a_retry_that_fares_otherwise_reports_the_part_that_is_there(tmp_path: Path) -> None:
    first = write(answered(row(0)), tmp_path)
    second = write(answered(failed(0, ["caption"])), tmp_path)
    assert second["part"] == first["part"]
    assert second["footer"].tally.counts == {"ok": 1, "failed": 0, "skipped": 0}


def test_a_source_row_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    half = row(7, ["caption", "colour"])[:1]
    with pytest.raises(JobError, match=r"a.tar row 7: 1 answers came where \[2\] were promised"):
        write(answered(half), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_status_that_the_table_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"a.tar row 0: status 'done' is none of ok, failed"):
        write(answered(row(0, status="done")), tmp_path)


def test_a_missing_column_names_the_stage_and_what_it_wants(tmp_path: Path) -> None:
    table = answered(row(0)).drop_columns(["row_answers"])
    with pytest.raises(JobError, match=r"write: columns \['row_answers'\] are missing; wants"):
        write(table, tmp_path)


def test_a_part_holds_its_rows_in_the_order_they_came(tmp_path: Path) -> None:
    receipt = write(answered(row(3), row(1), row(2)), tmp_path)
    table, _ = read_part(Output(str(tmp_path), StorageSpec()), receipt["part"])
    assert table["source_index"].to_pylist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "is not a whole Parquet file"),
        (lambda data: b"", "is not a whole Parquet file"),
        (lambda data: data.replace(b'{"version":1', b'{"version":7'), "footer version 7"),
        (lambda data: data.replace(b'"fingerprint"', b'"fingerpaint"'), "footer is damaged"),
    ],
)
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, damage, message: str) -> None:
    name = write(answered(row(0)), tmp_path)["part"]
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(JobError, match=message) as error:
        read_info(Output(str(tmp_path), StorageSpec()), name)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("column", ["source_index", "answer"])
def test_a_part_whose_rows_are_damaged_is_named_with_the_remedy(
    tmp_path: Path, column: str
) -> None:
    name = write(answered(row(0)), tmp_path)["part"]
    damage_pages(tmp_path / name, column)
    with pytest.raises(JobError, match=r"its rows are damaged .* run the job again") as error:
        read_part(Output(str(tmp_path), StorageSpec()), name)
    assert str(tmp_path / name) in str(error.value)


def test_one_changed_bit_of_an_answer_is_damage(tmp_path: Path) -> None:
    """Stored as it is: nothing but the page's checksum can tell."""
    table = pa.table({"answer": ["red"] * 3})
    footer = Footer((), FINGERPRINT)
    data = bytearray(part_bytes(table, footer))
    first = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(0).column(0)
    at = data.index(b"red", first.dictionary_page_offset)
    data[at] ^= 1
    (tmp_path / "part.parquet").write_bytes(data)
    with pytest.raises(JobError, match="its rows are damaged"):
        read_part(Output(str(tmp_path), StorageSpec()), "part.parquet")


def test_text_that_is_not_utf8_is_damage_where_there_is_no_checksum(tmp_path: Path) -> None:
    wrong = pa.array([b"caf\xe9"]).view(pa.string())
    file = tmp_path / "part.parquet"
    file.write_bytes(part_bytes(pa.table({"answer": wrong}), Footer((), FINGERPRINT)))
    with pytest.raises(JobError, match="its rows are damaged"):
        read_part(Output(str(tmp_path), StorageSpec()), file.name)


def test_a_footer_whose_end_is_damaged_is_named(tmp_path: Path) -> None:
    name = write(answered(row(0)), tmp_path)["part"]
    data = bytearray((tmp_path / name).read_bytes())
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[start : start + 30] = b"\xff" * 30
    (tmp_path / name).write_bytes(data)
    with pytest.raises(JobError, match="is not a whole Parquet file"):
        read_info(Output(str(tmp_path), StorageSpec()), name)


def test_a_part_that_is_not_there_is_no_damaged_part(tmp_path: Path) -> None:
    for read in (read_info, read_part):
        with pytest.raises(FileNotFoundError):
            read(Output(str(tmp_path), StorageSpec()), "gone.parquet")


def test_a_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(answered_schema({}).empty_table(), tmp_path / "foreign.parquet")
    with pytest.raises(JobError, match=r"foreign.parquet: has no `lavaflow` footer"):
        read_info(Output(str(tmp_path), StorageSpec()), "foreign.parquet")


texts = st.text(max_size=8)
ranges = st.builds(Ranges.of_indexes, st.lists(st.integers(0, 50)))
failures = st.builds(Failures, st.integers(1, 9), texts, st.integers(0, 9), texts)
footers = st.builds(
    Footer,
    shards=st.lists(
        st.builds(
            ShardCoverage,
            texts,
            texts,
            st.none() | st.integers(0, 9),
            st.dictionaries(texts, ranges),
        ),
        unique_by=lambda shard: (shard.uri, shard.identity),
    ).map(lambda shards: tuple(sorted(shards, key=lambda s: (s.uri, s.identity)))),
    fingerprint=st.builds(
        Fingerprint, st.dictionaries(texts, texts), st.dictionaries(texts, texts)
    ),
    run_ids=st.lists(texts).map(tuple),
    tally=st.builds(
        Tally,
        st.fixed_dictionaries(dict.fromkeys(["ok", "failed", "skipped"], st.integers(0, 9))),
        st.dictionaries(texts, failures),
    ),
)


@given(footers)
def test_a_footer_reads_back_as_it_was(footer: Footer) -> None:
    assert Footer.from_bytes(footer.to_bytes(), name="x") == footer


@given(st.lists(st.sampled_from(["ok", "failed", "skipped"])), st.integers(0, 9))
def test_the_tally_of_parts_is_the_tally_of_the_whole(statuses: list[str], cut: int) -> None:
    rows = [
        {
            "source_uri": "a",
            "source_index": i,
            "status": s,
            "error_class": "E",
            "error_message": "m",
        }
        for i, s in enumerate(statuses)
    ]
    assert Tally.of(rows[:cut]) + Tally.of(rows[cut:]) == Tally.of(rows)


def test_the_key_depends_on_what_is_covered_only() -> None:
    shards = (ShardCoverage("a", "1", 3, {"x": Ranges(((0, 3),))}),)
    plain = Footer(shards, FINGERPRINT)
    told = Footer(shards, FINGERPRINT, ("run",), Tally({"ok": 3, "failed": 0, "skipped": 0}))
    other = Footer(shards, Fingerprint({"weights": "w2"}, {}))
    assert plain.key == told.key != other.key
    assert json.loads(plain.to_bytes())["version"] == 1
