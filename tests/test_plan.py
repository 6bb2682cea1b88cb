"""What a run has to do: which shards, and with `source.limit` which of their rows."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.plan import Plan
from pipeline.coverage import Coverage
from pipeline.flow import read_tasks
from pipeline.sources import open_source
from pipeline.versions import ALL_STAND
from pipeline.write import coverage_of
from schemas.job import JobSpec
from tests.answered import FINGERPRINT
from tests.lines import tables_read, unfolded
from tests.shards import image_bytes, json_bytes, write_shard
from tests.whole_jobs import job_of

SIZES = [4, 0, 3, 1, 5]
"""Rows of each shard."""
ROWS = sum(SIZES)
PNG = image_bytes()


def write_tars(folder: Path) -> None:
    for number, size in enumerate(SIZES):
        members = [(f"{index}.png", PNG) for index in range(size)]
        write_shard(folder / f"{number}.tar", members)


def write_tables(folder: Path) -> None:
    for number, size in enumerate(SIZES):
        table = pd.DataFrame({"image": [PNG] * size}, columns=["image"])
        table.to_parquet(folder / f"{number}.parquet", row_group_size=2)


def write_manifests(folder: Path) -> None:
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.png").write_bytes(PNG)
    for number, size in enumerate(SIZES):
        rows = [{"image": random.Random(index).choice(["a.png", "b.png"])} for index in range(size)]
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(map(json_bytes, rows)))


def write_images(folder: Path) -> None:
    for number in range(ROWS):
        (folder / f"{number:02}.png").write_bytes(PNG)


FORMATS = {
    "webdataset": write_tars,
    "parquet": write_tables,
    "manifest": write_manifests,
    "images": write_images,
}


@pytest.fixture(params=FORMATS)
def job(request: pytest.FixtureRequest, tmp_path: Path) -> JobSpec:
    (tmp_path / "in").mkdir()
    FORMATS[request.param](tmp_path / "in")
    suffix = "*.jsonl" if request.param == "manifest" else "*"
    source = {"format": request.param, "path": f"{tmp_path}/in/{suffix}"}
    return job_of(
        tmp_path / "in", tmp_path / "out", source=source, ask=[{"id": "a", "prompt": "b"}]
    )


def planned(job: JobSpec, *, limit: int | None) -> Plan:
    source = job.source.model_copy(update={"limit": limit})
    shards = open_source(job.source).list()
    job = job.model_copy(update={"source": source})
    return Plan(job=job, shards=shards, keep={}, fingerprint=FINGERPRINT)


def read(plan: Plan, coverage: Coverage) -> list[tuple[str, int]]:
    """The places of the rows that one pass reads, all of which are answered then."""
    rows: list[dict[str, Any]] = []
    limit = plan.job.source.limit
    for task in read_tasks(plan.work(coverage, ALL_STAND), limit=limit):
        for table in tables_read(plan.job, task.work, limit=task.limit):
            rows += unfolded(table)
    answered = [{"units": (), **row, "row_answers": 1, "question_id": "a"} for row in rows]
    coverage.add_all(coverage_of(answered))
    return [
        (row["source_uri"], row["source_index"]) for row in rows if row["source_index"] is not None
    ]


def all_places(job: JobSpec) -> list[tuple[str, int]]:
    return sorted(read(planned(job, limit=None), Coverage()))


@pytest.mark.parametrize("limit", range(1, ROWS + 3))
def test_the_first_rows_are_read_and_then_there_is_nothing_to_do(job: JobSpec, limit: int) -> None:
    coverage = Coverage()
    plan = planned(job, limit=limit)
    assert sorted(read(plan, coverage)) == all_places(job)[:limit]
    assert plan.work(coverage, ALL_STAND) == []


@pytest.mark.parametrize("limits", [(2, 9, None), (9, 2, None), (1, 2, 3, 4, 5, 13), (None, 3)])
def test_whatever_the_limits_every_row_is_read_once(
    job: JobSpec, limits: tuple[int | None, ...]
) -> None:
    coverage = Coverage()
    times = Counter(
        place for limit in limits for place in read(planned(job, limit=limit), coverage)
    )
    assert times == Counter(all_places(job))


def test_a_question_added_later_is_asked_of_the_first_rows(job: JobSpec) -> None:
    coverage = Coverage()
    read(planned(job, limit=None), coverage)
    more = job.model_copy(update={"ask": (*job.ask, job.ask[0].model_copy(update={"id": "new"}))})
    plan = planned(more, limit=6)
    assert sorted(read(plan, coverage)) == all_places(job)[:6]
    assert plan.work(coverage, ALL_STAND) == []


@pytest.mark.parametrize(("limit", "most"), [(None, ROWS), (5, 5), (100, ROWS)])
def test_how_many_answers_there_will_be_is_known_of_files_of_one_row(
    tmp_path: Path, limit: int | None, most: int
) -> None:
    write_images(tmp_path)
    source = {"format": "images", "path": str(tmp_path)}
    ask = [{"id": each, "prompt": "b"} for each in "xyz"]
    job = job_of(tmp_path, tmp_path / "out", source=source, ask=ask)
    assert planned(job, limit=limit).most_answers == 3 * most


def test_how_many_answers_there_will_be_is_not_known_of_others(tmp_path: Path) -> None:
    write_tars(tmp_path)
    job = job_of(tmp_path, tmp_path / "out", ask=[{"id": "a", "prompt": "b"}])
    assert planned(job, limit=None).most_answers is None
    assert planned(job, limit=7).most_answers == 7
    own = job_of(tmp_path, tmp_path / "out")
    assert planned(own, limit=7).most_answers is None
