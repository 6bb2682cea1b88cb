"""What rows leave behind in the processes that they go through. `make soak` has the whole jobs."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.coverage import ShardCoverage
from pipeline.encode import Encode
from pipeline.read import ReadTask, ShardWork, read_shards
from pipeline.sources import open_source
from schemas.job import JobSpec
from tests.hostile_decoders import children_of
from tests.memory import sizes_of
from tests.shards import image_bytes, write_shard
from tests.whole_jobs import job_of

SHARDS, IMAGES = 10, 400
MOST_MB = 5.0
"""A shard's pixels are more: what holds on to them is seen."""


def batches(job: JobSpec) -> Iterator[pa.Table]:
    source = open_source(job.source)
    for shard in source.list():
        work = ShardWork(shard, ShardCoverage(shard.uri, shard.identity))
        for table in read_shards(job, ReadTask([work]), keep={}, on_failure=pytest.fail):
            for start in range(0, len(table), 16):
                yield table.slice(start, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_that_are_read_and_encoded_leave_nothing_behind(tmp_path: Path) -> None:
    for shard in range(SHARDS):
        images = [(f"{n}.png", image_bytes(color=(shard, n % 256, 0))) for n in range(IMAGES)]
        write_shard(tmp_path / "in" / f"{shard}.tar", images)
    job = job_of(tmp_path / "in", tmp_path / "out")
    pid, sizes = os.getpid(), []
    others = children_of(pid)
    encode = Encode(job, {})
    for _, some in itertools.groupby(batches(job), key=lambda batch: batch["source_uri"][0]):
        for batch in some:
            encode(batch)
        ours = [pid, *(child for child in children_of(pid) if child not in others)]
        sizes.append([own_mb(each) for each in ours])
    growth = [last - second for second, last in zip(sizes[1], sizes[-1], strict=True)]
    assert len(growth) == 2
    assert max(growth) < MOST_MB


def own_mb(pid: int) -> float:
    sizes = sizes_of(pid)
    assert sizes is not None
    return sizes.anon
