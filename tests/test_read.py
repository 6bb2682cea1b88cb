"""Shards to tables of samples: which rows are left out, skipped or marked."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.verify import verify
from pipeline.coverage import ShardCoverage
from pipeline.read import ShardWork, read_shards
from pipeline.sources import open_source
from schemas.errors import SpecError
from schemas.job import JobSpec
from tests.shards import image_bytes, json_bytes, write_shard
from tests.whole_jobs import answers, job_of, ray_of, run, write_shapes

WIDTHS: list[Any] = [640, 320, None, "wide"]


def rows_of(job: JobSpec) -> list[dict[str, Any]]:
    source = open_source(job.source)
    work = [ShardWork(s, ShardCoverage(s.uri, s.identity)) for s in source.list()]
    return [row for table in read_shards(job, work, keep={}) for row in table.to_pylist()]


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
    (tmp_path / "a.png").write_bytes(image_bytes())
    lines = [json_bytes({"image": "a.png", "width": width}) for width in WIDTHS[:3]]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    source = {"format": "manifest", "path": str(tmp_path / "m.jsonl")}
    assert filtered(tmp_path, **source) == ["kept", "Filtered", "Filtered"]


def test_image_files_are_filtered_by_their_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(image_bytes())
    source = {"format": "images", "path": str(tmp_path), "where": "matches(__key__, '^a')"}
    job = job_of(tmp_path, tmp_path / "out", source=source, ask=[{"id": "a", "prompt": "b"}])
    assert [row["skip"] is None for row in rows_of(job)] == [True, False]


def test_a_condition_that_is_none_is_a_spec_error(tmp_path: Path) -> None:
    source = {"format": "webdataset", "path": str(tmp_path), "where": "width >"}
    with pytest.raises(SpecError, match=r"source\.where"):
        open_source(job_of(tmp_path, tmp_path / "out", source=source).source)


@pytest.mark.slow
def test_filtered_rows_are_in_the_table_and_verify_knows_them(tmp_path: Path) -> None:
    write_shapes(tmp_path / "in", shards=1, images=4)
    source = {"format": "webdataset", "path": str(tmp_path / "in"), "where": "__key__ < '002'"}
    job = job_of(tmp_path / "in", tmp_path / "out", source=source)
    with ray_of(num_cpus=2):
        result, _ = run(job)
    assert result.record["counts"] == {"ok": 4, "failed": 0, "skipped": 4}
    reasons = {row["error_class"] for row in answers(tmp_path / "out")}
    assert reasons == {None, "Filtered"}
    assert verify(job).ok
