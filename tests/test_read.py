"""Shards to tables of images and lines: which lines are left out, skipped or marked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline.coverage import Ranges, ShardCoverage
from pipeline.read import MOST_LINES, ShardWork
from pipeline.sources import open_source
from schemas.errors import SpecError, StoreUnavailable
from schemas.job import JobSpec
from schemas.tables import SAMPLE, with_keep
from tests.lines import tables_read, unfolded
from tests.shards import image_bytes, json_bytes, write_shard
from tests.whole_jobs import job_of

WIDTHS: list[Any] = [640, 320, None, "wide"]


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(image_bytes())


def write_manifest(path: Path, rows: Iterable[Any]) -> None:
    path.write_bytes(b"\n".join(map(json_bytes, rows)))


def rows_of(job: JobSpec) -> list[dict[str, Any]]:
    source = open_source(job.source)
    work = [ShardWork(s, ShardCoverage(s.uri, s.identity)) for s in source.list()]
    return [row for table in tables_read(job, work) for row in unfolded(table)]


def filtered(folder: Path, **source: Any) -> list[str]:
    """What became of each row: its error or skip class, or `kept` with its image."""
    spec = {"path": str(folder), "where": "width > 500", **source}
    job = job_of(folder, folder / "out", source=spec)
    told = []
    for row in rows_of(job)[:-1]:
        reason = row["skip"] or row["image_error"]
        assert (row["image"] is None) == (reason is not None)
        told.append(reason["class"] if reason else "kept")
    return told


def test_rows_of_a_tar_are_filtered_by_their_json(tmp_path: Path) -> None:
    members = []
    for number, width in enumerate(WIDTHS):
        members.append((f"{number}.png", image_bytes()))
        members.append((f"{number}.json", json_bytes({"width": width})))
    write_shard(tmp_path / "a.tar", members)
    found = filtered(tmp_path, format="webdataset")
    assert found == ["kept", "Filtered", "Filtered", "FilterFailed"]


def test_rows_of_a_table_are_filtered_by_their_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [image_bytes()] * 3, "width": [640.0, 320.0, None]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert filtered(tmp_path, format="parquet") == ["kept", "Filtered", "Filtered"]


def test_rows_of_a_manifest_are_filtered_by_their_keys(tmp_path: Path) -> None:
    write_images(tmp_path, "0.png", "1.png", "2.png")
    rows = [{"image": f"{n}.png", "width": width} for n, width in enumerate(WIDTHS[:3])]
    write_manifest(tmp_path / "m.jsonl", rows)
    source = {"format": "manifest", "path": str(tmp_path / "m.jsonl")}
    assert filtered(tmp_path, **source) == ["kept", "Filtered", "Filtered"]


def test_image_files_are_filtered_by_their_name(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    source = {"format": "images", "path": str(tmp_path), "where": "matches(__key__, '^a')"}
    job = job_of(tmp_path, tmp_path / "out", source=source, ask=[{"id": "a", "prompt": "b"}])
    assert [row["skip"] is None for row in rows_of(job)] == [True, False]


def test_a_condition_that_is_none_is_a_spec_error(tmp_path: Path) -> None:
    source = {"format": "webdataset", "path": str(tmp_path), "where": "width >"}
    with pytest.raises(SpecError, match=r"source\.where"):
        open_source(job_of(tmp_path, tmp_path / "out", source=source).source)


def manifest_job(folder: Path, rows: Iterable[Any], **source: Any) -> JobSpec:
    write_manifest(folder / "m.jsonl", rows)
    spec = {"format": "manifest", "path": str(folder / "m.jsonl"), **source}
    return job_of(folder, folder / "out", source=spec)


def tables_of(
    job: JobSpec,
    *,
    keep: Sequence[str] = (),
    done: Mapping[str, Ranges] | None = None,
    limit: int | None = None,
    failures: list[StoreUnavailable] | None = None,
) -> list[pa.Table]:
    source = open_source(job.source)
    work = [ShardWork(s, ShardCoverage(s.uri, s.identity, units=done or {})) for s in source.list()]
    return tables_read(
        job, work, keep=dict.fromkeys(keep, pa.string()), limit=limit, failures=failures
    )


def test_lines_on_one_image_are_one_row(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    asked = [("a", "x?"), ("b", "y?"), ("a", "z?"), ("no", "u?"), ("no", "v?")]
    rows = [{"image": f"{a}.png", "question": q, "id": f"{q}{a}"} for a, q in asked]
    job = manifest_job(tmp_path, [*rows, 7], keep=["id"])
    done = {"shape": Ranges.of_indexes([2])}
    [table] = tables_of(job, keep=["id"], done=done)
    assert table.schema == with_keep(SAMPLE, {"id": pa.string()})
    told = [
        [
            (line["source_index"], line["sample_id"], line["questions"], line["units"])
            for line in row["lines"] or ()
        ]
        for row in table.to_pylist()
    ]
    both = ["shape", "questions"]
    own = [[{"id": "q0", "question": question}] for _, question in asked]
    assert told == [
        [(0, "x?a", own[0], both), (2, "z?a", own[2], ["questions"])],
        [(1, "y?b", own[1], both)],
        [(3, "u?no", own[3], both)],
        [(4, "v?no", own[4], both)],
        [(5, "", None, both)],
        [],
    ]
    kept = [['"x?a"', '"z?a"'], ['"y?b"'], ['"u?no"'], ['"v?no"'], [None], None]
    assert table["keep.id"].to_pylist() == kept
    errors = [[e[k] for k in ("image_error", "error")] for e in unfolded(table)[3:6]]
    assert [[e and e["class"] for e in pair] for pair in errors] == [
        ["ImageMissing", None],
        ["ImageMissing", None],
        [None, "ManifestMalformed"],
    ]
    assert [row["rows_total"] for row in table.to_pylist()] == [None] * 5 + [6]


def test_an_image_with_many_lines_has_several_rows_of_it(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    job = manifest_job(tmp_path, [{"image": "a.png"}] * (2 * MOST_LINES + 1))
    [table] = tables_of(job)
    assert [len(lines or ()) for lines in table["lines"].to_pylist()] == [
        MOST_LINES,
        MOST_LINES,
        1,
        0,
    ]
    assert table["image"].to_pylist() == [image_bytes()] * 3 + [None]


def test_tables_hold_so_many_lines_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, *(f"{n}.png" for n in range(4)))
    job = manifest_job(tmp_path, [{"image": f"{n}.png"} for n in range(4)] * 3)
    monkeypatch.setattr("pipeline.read.MAX_TABLE_LINES", 6)
    assert [table.num_rows for table in tables_of(job)] == [2, 2, 1]
    monkeypatch.setattr("pipeline.read.MAX_TABLE_BYTES", len(image_bytes()))
    assert [table.num_rows for table in tables_of(job)] == [1] * 5


def test_each_line_on_an_image_is_filtered_by_itself(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    rows = [{"image": f"{name}.png", "width": width} for name in "ab" for width in WIDTHS[:3]]
    job = manifest_job(tmp_path, rows[:5], where="width > 500 and image == 'a.png'")
    found = rows_of(job)[:-1]
    assert [row["skip"] is None for row in found] == [True, False, False, False, False]
    assert [row["image"] is None for row in found] == [False, False, False, True, True]


def test_files_of_one_row_carry_their_length_and_have_no_end_mark(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    source = {"format": "images", "path": str(tmp_path)}
    ask = [{"id": "a", "prompt": "b"}]
    [table] = tables_of(job_of(tmp_path, tmp_path / "out", source=source, ask=ask))
    assert table["rows_total"].to_pylist() == [1, 1]
    done = tables_of(
        job_of(tmp_path, tmp_path / "out", source=source, ask=ask),
        done={"a": Ranges.of_indexes([0])},
    )
    assert [(r["rows_total"], r["lines"]) for r in done[0].to_pylist()] == [(1, None)] * 2


def test_a_store_that_fails_leaves_the_shard_without_an_end(tmp_path: Path) -> None:
    rows = [{"image": f"http://127.0.0.1:1/{n}.png"} for n in range(20)]
    job = manifest_job(tmp_path, rows, image_timeout_s=0.5)
    failures: list[StoreUnavailable] = []
    assert tables_of(job, failures=failures) == []
    assert ["http://127.0.0.1:1" in str(failure) for failure in failures] == [True]


def test_all_images_of_a_row_travel_in_their_order_and_rows_of_others_apart(
    tmp_path: Path,
) -> None:
    images = {name: image_bytes(color=(n, 0, 0)) for n, name in enumerate("abc")}
    for name, image in {**images, "empty": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(image)
    lists = ["a b c", "a c b", "a", "empty a", "empty b", "a b c"]
    rows = [{"image": [f"{name}.png" for name in names.split()]} for names in lists]
    write_manifest(tmp_path / "m.jsonl", rows)
    job = job_of(tmp_path, tmp_path / "out", source={"format": "manifest", "path": str(tmp_path)})
    source = open_source(job.source)
    work = [ShardWork(s, ShardCoverage(s.uri, s.identity)) for s in source.list()]
    [table] = tables_read(job, work)
    found = [
        ([line["source_index"] for line in row["lines"]], row["image"], row["more_images"])
        for row in table.to_pylist()[:-1]
    ]
    a, b, c = images.values()
    assert found == [
        ([0, 5], a, [b, c]),
        ([1], a, [c, b]),
        ([2], a, None),
        ([3], b"", [a]),
        ([4], b"", [b]),
    ]
