"""`flow.py` and `gather.py`: when answers become durable, and what ends the work."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.plan import plan
from pipeline.coverage import Coverage
from pipeline.footer import Footer
from pipeline.parts import read_info
from pipeline.resources import resolve_resources
from pipeline.storage import Output
from pipeline.versions import ALL_STAND
from schemas.job import JobSpec, OutputSpec, StorageSpec
from tests.answered import FINGERPRINT, answered, row
from tests.watch import wait_until
from tests.whole_jobs import job_of, ray_of, write_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_ray")]

ANSWERS = 24


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    with ray_of(num_cpus=2):
        yield


def small_job(folder: Path, *, in_flight: int | None = None, **output: Any) -> JobSpec:
    """12 images with two questions each, in blocks of 4 images and one of the end mark."""
    write_shapes(folder / "in", shards=1, images=12)
    resources = {"generate": {"batch_size": 4}, "bytes_in_flight": in_flight}
    output = {"path": str(folder / "out"), **output}
    return job_of(folder / "in", folder / "out", output=output, resources=resources)


def steps_of(job: JobSpec, *, stop: threading.Event | None = None) -> Any:
    import ray

    from pipeline import flow

    planned = plan(job)
    run = flow.Run(
        job=planned.job,
        keep=planned.keep,
        run_id="run-1",
        fingerprint=planned.fingerprint,
        resources=resolve_resources(job.resources, ray.cluster_resources()),
    )
    work = planned.work(Coverage(), ALL_STAND)
    return flow.answer(run, work, stop=stop or threading.Event(), say=print)


def part_rows(steps: Any) -> list[int]:
    """Answers in each part, in the order in which they became durable."""
    receipts = [row for step in steps for row in step.receipt.to_pylist()]
    return [Footer.from_bytes(r["footer"].encode(), name="").tally.rows for r in receipts]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"commit_interval_s": 600}, [24]),
        ({"commit_interval_s": 600, "rows_per_file": 10}, [16, 8]),
        ({"commit_interval_s": 0, "in_flight": 1}, [0, 8, 8, 8]),
    ],
    ids=["the end", "a file full", "every batch, with no room for any"],
)
def test_answers_become_durable_with(
    tmp_path: Path, output: dict[str, Any], expected: list[int]
) -> None:
    steps, times = [], []
    for step in steps_of(small_job(tmp_path, **output)):
        steps.append(step)
        times.append(time.monotonic())
    assert sorted(part_rows(steps)) == sorted(expected)
    assert steps[-1].waiting == 0
    # There are steps while the model is loaded, too.
    assert max(after - before for before, after in itertools.pairwise(times)) < 5
    assert pq.read_table(tmp_path / "out/staging").num_rows == ANSWERS


@pytest.mark.parametrize("steps_taken", [1, 1000])
def test_closed_early_it_leaves_nothing_at_work(tmp_path: Path, steps_taken: int) -> None:
    import ray

    steps = steps_of(small_job(tmp_path, commit_interval_s=600))
    for _, step in zip(range(steps_taken), steps, strict=False):
        if step.waiting:
            break
    closed_at = time.monotonic()
    steps.close()
    assert time.monotonic() - closed_at < 5
    assert not [t for t in threading.enumerate() if t.name == "lavaflow-bundles"]
    wait_until(lambda: ray.available_resources().get("CPU") == 2, timeout_s=15)
    assert not (tmp_path / "out").exists()


def test_told_to_stop_before_anything_has_begun_it_ends_without_waiting_for_the_model(
    tmp_path: Path,
) -> None:
    stop = threading.Event()
    stop.set()
    assert part_rows(steps_of(small_job(tmp_path), stop=stop)) == []


def test_a_chain_that_fails_gives_what_it_had_before() -> None:
    import ray.data

    from pipeline.flow import _Execution

    def fail_late(batch: pa.Table) -> pa.Table:
        if batch["item"][0].as_py() == 1:
            time.sleep(2)
            raise ArithmeticError("the second fails")
        return batch

    chain = ray.data.from_items([0, 1], override_num_blocks=2)
    with _Execution(chain.map_batches(fail_late, batch_format="pyarrow", num_cpus=0.5)) as work:
        wait_until(lambda: work.take(timeout_s=1) is not None or work.is_over, timeout_s=30)
        assert work.rows == 1
        wait_until(lambda: work.take(timeout_s=1) is None and work.is_over, timeout_s=30)
        with pytest.raises(ray.exceptions.RayError, match="the second fails"):
            work.raise_error()


def test_blocks_are_written_as_one_part_slices_included(tmp_path: Path) -> None:
    gathered = gathering(tmp_path, said=[])
    whole, cut = (bundle_of(answered(row(n), row(n + 1))) for n in (0, 2))
    gathered.add(whole)
    gathered.add(cut.slice(1)[0])
    gathered.write(older_than_s=0)
    receipt = gathered.receipt(timeout_s=60)
    assert gathered.rows == 0
    store = Output(str(tmp_path / "out"), StorageSpec())
    (part,) = receipt["part"].to_pylist()
    assert read_info(store, part).rows == 3


def test_blocks_that_are_lost_are_told_of_and_not_committed(tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Owner:
        def put(self, block: pa.Table) -> list[ray.ObjectRef]:
            return [ray.put(block)]

    owner = Owner.remote()
    said: list[str] = []
    gathered = gathering(tmp_path, said=said)
    bundle = bundle_of(answered(row(0), row(1)), put=lambda b: ray.get(owner.put.remote(b))[0])
    gathered.add(bundle)
    ray.kill(owner)
    wait_until(lambda: is_lost(bundle.block_refs[0]), timeout_s=30)
    gathered.write(older_than_s=0)
    assert gathered.receipt(timeout_s=60).num_rows == 0
    assert gathered.rows == 0
    assert said[0].startswith("2 answers were lost before they were written (")
    assert not (tmp_path / "out").exists()


def is_lost(ref: Any) -> bool:
    import ray

    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return True
    return False


def gathering(folder: Path, *, said: list[str]) -> Any:
    from pipeline.gather import Gathered

    output = OutputSpec(path=str(folder / "out"))
    return Gathered(output, keep={}, fingerprint=FINGERPRINT, say=said.append)


def bundle_of(block: pa.Table, *, put: Callable[[pa.Table], Any] | None = None) -> Any:
    import ray
    from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
    from ray.data.block import BlockAccessor

    entry = BlockEntry((put or ray.put)(block), BlockAccessor.for_block(block).get_metadata())
    return RefBundle((entry,), schema=block.schema, owns_blocks=True)
