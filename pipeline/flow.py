"""The chain that every row goes through, top to bottom. The only importer of ray.data.

    read  ->  prepare  ->  generate  ->  write
    tasks     CPU actors   accelerator   tasks
                           actors

Blocks are cut to one batch before the first actor, so that each call of a stage is one batch and
what a kill can cost is a batch in flight, not a shard.
"""

import contextlib
import functools
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
import ray.data

from pipeline.encode import Encode
from pipeline.footer import Fingerprint
from pipeline.generate import Generate
from pipeline.read import ShardWork, read_shards
from pipeline.resources import Resources
from pipeline.write import write_part
from schemas.errors import JobError, LavaflowError
from schemas.job import JobSpec

CONNECT_TIMEOUT_S = 5.0
FILES_PER_TASK = 64
"""Shards of a single row (image files) that one read task takes; other shards get a task each."""


@dataclass(frozen=True)
class Run:
    """What the stages have to know of one run of a job."""

    job: JobSpec
    keep: Mapping[str, pa.DataType]
    run_id: str
    fingerprint: Fingerprint
    resources: Resources


def answer(run: Run, work: Sequence[ShardWork]) -> Iterator[pa.Table]:
    """Answer the missing rows of the shards; yields the receipt of each part as it is durable.

    Raises JobError where Ray gives up. Needs `session`.
    """
    job, keep, r = run.job, run.keep, run.resources
    chain = (
        _samples(run, work)
        .map_batches(
            Stage,
            fn_constructor_args=(functools.partial(Encode, job, keep),),
            batch_size=r.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=r.preprocess_actors[0], max_size=r.preprocess_actors[1]
            ),
            num_cpus=r.preprocess_cpus,
        )
        .map_batches(
            Stage,
            fn_constructor_args=(
                functools.partial(
                    Generate, job, keep, run_id=run.run_id, threads=r.generate_threads
                ),
            ),
            batch_size=r.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=r.generate_actors),
            num_cpus=r.generate_cpus,
            num_gpus=r.generate_gpus,
        )
        .map_batches(
            write_part,
            fn_kwargs={"output": job.output, "keep": keep, "fingerprint": run.fingerprint},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=r.write_cpus,
        )
    )
    with _errors_of_the_job():
        yield from chain.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _samples(run: Run, work: Sequence[ShardWork]) -> ray.data.Dataset:
    """The rows still to be answered, in blocks of one batch."""
    tasks = [{"work": pickle.dumps(group)} for group in groups_of(work)]
    read = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        _read,
        fn_kwargs={"job": run.job, "keep": run.keep},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=run.resources.read_cpus,
    )
    cut = read.repartition(target_num_rows_per_block=run.resources.batch_size)
    # Ray has no argument for what cutting costs. Said to cost what reading does, it becomes a part
    # of the reading tasks; else it takes tasks of a whole CPU, which a small machine never has.
    cut._logical_plan.dag.ray_remote_args["num_cpus"] = run.resources.read_cpus
    return cut


def _read(batch: pa.Table, *, job: JobSpec, keep: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
    for group in batch["work"].to_pylist():
        yield from read_shards(job, pickle.loads(group), keep=keep)


def groups_of(work: Sequence[ShardWork]) -> list[Sequence[ShardWork]]:
    """The shards of each read task, in order; every shard is in exactly one."""
    files = [item for item in work if item.shard.rows == 1]
    shards = [item for item in work if item.shard.rows != 1]
    starts = range(0, len(files), FILES_PER_TASK)
    return [*([s] for s in shards), *(files[start : start + FILES_PER_TASK] for start in starts)]


class Stage:
    """A stage that is built on its actor.

    What is wrong with a model or a machine is found there; raised by a constructor, only its text
    would reach the driver, so it is raised by the first call.
    """

    def __init__(self, build: Callable[[], Callable[[pa.Table], pa.Table]]) -> None:
        self._error: LavaflowError | None = None
        try:
            self._call = build()
        except LavaflowError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._error:
            raise self._error
        return self._call(batch)


@contextlib.contextmanager
def session(address: str | None) -> Iterator[dict[str, float]]:
    """A Ray session, here or on the cluster at `address`; gives the cluster's resources.

    A session that the caller has opened with `ray.init` is used as it is, and left open.

    Ray puts the driver's working directory on its workers' path: connecting from where our own
    packages live keeps a folder of the user's that is also called `jobs` from being imported.
    """
    if ray.is_initialized():
        _quiet()
        yield ray.cluster_resources()
        return
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ side warns on stderr that a restarted actor may miss its constructor's arguments,
    # which the driver holds for as long as the job runs; and when told not to, says that, too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    local = {} if address else {"include_dashboard": False}
    try:
        with contextlib.chdir(Path(__file__).parents[1]), _without_stderr():
            # Without an address, Ray would join any cluster that was started on this machine.
            ray.init(
                address=address or "local", log_to_driver=False, logging_level="ERROR", **local
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error
    try:
        _quiet()
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself goes on trying a host that does not answer, for minutes and without a word."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(
            f"cannot reach Ray at {address}: {error}; check --address and RAY_ADDRESS"
        ) from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing on this process's stderr, whatever language writes there."""
    with open(os.devnull, "wb") as nowhere:
        saved = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What Ray Data says of its doings is in the session's ray-data.log; errors are raised as well.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def _errors_of_the_job() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as error:
        raise JobError(_told(error)) from error


def _told(error: ray.exceptions.RayError) -> str:
    """What went wrong, without the layers that Ray wraps around it."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return f"Ray gave up: {error}"
    cause = error.cause
    # Ray Data appends a paragraph about its own retry settings.
    text = str(cause).partition("\nFailed to ")[0]
    return text if isinstance(cause, LavaflowError) else f"{type(cause).__name__}: {text}"
