"""The chain that every row goes through, top to bottom. The only importer of ray.data.

    read  ->  prepare  ->  generate  ->  write
    tasks     CPU actors   accelerator   tasks that the driver starts (`gather.py`)
                           actors

Blocks are cut to one batch before the first actor, so that each call of a stage is one batch and
what a kill can cost is a batch in flight and what was gathered, not a shard. When the run is told
to stop, the stages find the gate closed (`gate.py`).
"""

import contextlib
import functools
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa
import ray
import ray.data

from pipeline.batches import batches_of, packed, unpacked
from pipeline.encode import Encode
from pipeline.engine.load import import_libraries
from pipeline.footer import Fingerprint
from pipeline.gate import Gate
from pipeline.gather import Gathered
from pipeline.generate import Generate
from pipeline.parts import RECEIPT
from pipeline.read import ReadTask, ShardWork, read_shards
from pipeline.resources import Resources
from schemas.errors import JobError, LavaflowError
from schemas.job import JobSpec
from schemas.tables import PREPARED, answered_schema, with_keep

FILES_PER_TASK = 64
"""Shards of a single row (image files) that one read task takes; other shards get a task each."""
CALLS_AT_ONCE = 2
"""Batches in one engine: the next one begins while the last answers of one are given."""
BATCHES_AHEAD = 2
"""Those that wait at an engine, so that it never does."""
BATCH_BYTES = 16 * 2**20
"""A batch of images that come to more has fewer rows."""
TICK_S = 0.25
BUNDLES_AHEAD = 2
JOIN_S = 10.0
MOST_FAILURES_TOLD = 3


@dataclass(frozen=True)
class Run:
    """What the stages have to know of one run of a job. `again`: it answers failed rows again."""

    job: JobSpec
    keep: Mapping[str, pa.DataType]
    run_id: str
    fingerprint: Fingerprint
    resources: Resources
    again: bool = False


@dataclass(frozen=True)
class Step:
    """How far the work is. `receipt`: RECEIPT rows of parts that are durable since the last step.

    `waiting`: rows that are answered and not durable yet. `seconds`: with the last step, how long
    each stage was at work, summed over its workers.
    """

    receipt: pa.Table
    waiting: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def answer(
    run: Run, work: Sequence[ShardWork], *, stop: threading.Event, say: Callable[[str], None]
) -> Generator[Step, None, None]:
    """Answer the missing rows of the shards; gives the receipt of each part as it is durable.

    There is a step at least every TICK_S or so, whether anything has happened or not. Once `stop`
    is set, nothing new begins, and it ends when what was in flight is durable. Raises JobError
    where Ray gives up, when what was answered until then is durable. Closing it ends the work at
    once. Needs a Ray session.
    """
    _quiet()
    _bound(run.resources.bytes_in_flight)
    gate = Gate()
    gathered = Gathered(
        run.job.output, keep=run.keep, fingerprint=run.fingerprint, again=run.again, say=say
    )
    interval_s = run.job.output.commit_interval_s
    with _errors_of_the_job(), _Execution(_chain(run, work, gate)) as execution:
        while not execution.is_over:
            if stop.is_set():
                interval_s = 0.0
                if gate.rows_after_close("generate") == execution.rows:
                    break
            if gathered.has_room and (bundle := execution.take(timeout_s=TICK_S)) is not None:
                gathered.add(bundle)
            gathered.write(older_than_s=interval_s)
            receipt = gathered.receipt(timeout_s=0.0 if gathered.has_room else TICK_S)
            yield Step(receipt, gathered.rows)
        while gathered.rows:
            gathered.write(older_than_s=0.0)
            yield Step(gathered.receipt(timeout_s=TICK_S), gathered.rows)
        _tell_failures(gate, say)
        seconds = {**gate.seconds(), "write": gathered.seconds}
        yield Step(RECEIPT.empty_table(), 0, seconds)
        execution.raise_error()


def _tell_failures(gate: Gate, say: Callable[[str], None]) -> None:
    failures = gate.failures()
    for failure in failures[:MOST_FAILURES_TOLD]:
        say(f"Not read to its end: {failure}")
    if (more := len(failures) - MOST_FAILURES_TOLD) > 0:
        say(f"and {more:,} more shards")


def _chain(run: Run, work: Sequence[ShardWork], gate: Gate) -> ray.data.Dataset:
    job, keep, r = run.job, run.keep, run.resources
    prepare = functools.partial(_Prepare, job, keep)
    generate = functools.partial(Generate, job, keep, run_id=run.run_id, threads=r.generate_threads)
    prepared, answered = with_keep(PREPARED, keep), answered_schema(keep)
    return (
        _samples(run, work, gate)
        .map_batches(
            Stage,
            fn_constructor_args=("prepare", prepare, gate, prepared.empty_table()),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=r.preprocess_actors[0], max_size=r.preprocess_actors[1]
            ),
            num_cpus=r.preprocess_cpus,
        )
        .map_batches(
            Stage,
            fn_constructor_args=("generate", generate, gate, answered.empty_table()),
            batch_size=r.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=r.generate_actors,
                max_tasks_in_flight_per_actor=BATCHES_AHEAD + CALLS_AT_ONCE,
                max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=r.generate_cpus,
            num_gpus=r.generate_gpus,
        )
    )


def _samples(run: Run, work: Sequence[ShardWork], gate: Gate) -> ray.data.Dataset:
    """The rows still to be answered, in blocks of one batch, which is packed as one row."""
    limit = run.job.source.limit
    tasks = [{"task": pickle.dumps(task)} for task in read_tasks(work, limit=limit)]
    read = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        _read,
        fn_kwargs={"run": run, "gate": gate},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=run.resources.read_cpus,
    )
    cut = read.repartition(target_num_rows_per_block=1)
    # Ray has no argument for what cutting costs. Said to cost what reading does, it becomes a part
    # of the reading tasks; else it takes tasks of a whole CPU, which a small machine never has.
    cut._logical_plan.dag.ray_remote_args["num_cpus"] = run.resources.read_cpus
    return cut


def _read(batch: pa.Table, *, run: Run, gate: Gate) -> Iterator[pa.Table]:
    for task in batch["task"].to_pylist():
        tables = read_shards(
            run.job, pickle.loads(task), keep=run.keep, on_failure=gate.tell_failure
        )
        batches = batches_of(tables, rows=run.resources.batch_size, n_bytes=BATCH_BYTES)
        for rows in _timed(batches, gate):
            # What is left out here, end marks and all, is read again by the next run.
            if not gate.is_open():
                return
            yield packed(rows)
            del rows


def _timed(tables: Iterator[pa.Table], gate: Gate) -> Iterator[pa.Table]:
    """The same tables; what it takes to read them is told."""
    while True:
        start = time.monotonic()
        table = next(tables, None)
        gate.tell_time("read", time.monotonic() - start)
        if table is None:
            return
        yield table
        del table


class _Prepare:
    """`Encode`, for a packed batch."""

    def __init__(self, job: JobSpec, keep: Mapping[str, pa.DataType]) -> None:
        self._encode = Encode(job, keep)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._encode(unpacked(batch))


def read_tasks(work: Sequence[ShardWork], *, limit: int | None) -> list[ReadTask]:
    """The shards of each task, in order; every shard is in exactly one.

    Which are the first rows of shards whose lengths are not known is known to one task only, which
    reads them all.
    """
    if limit is not None and any(item.shard.rows is None for item in work):
        return [ReadTask(work, limit)]
    files = [item for item in work if item.shard.rows == 1]
    shards = [item for item in work if item.shard.rows != 1]
    starts = range(0, len(files), FILES_PER_TASK)
    groups = [*([s] for s in shards), *(files[start : start + FILES_PER_TASK] for start in starts)]
    return [ReadTask(group) for group in groups]


class Stage:
    """A stage that is built on its actor, and that begins nothing once the gate is closed.

    What is wrong with a model or a machine is found there; raised by a constructor, only its text
    would reach the driver, so it is raised by the first call.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Callable[[pa.Table], pa.Table]],
        gate: Gate,
        nothing: pa.Table,
    ) -> None:
        self._name, self._gate, self._nothing = name, gate, nothing
        self._error: LavaflowError | None = None
        gate.arrive(name)
        import_libraries()
        try:
            self._call = build()
        except LavaflowError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._error:
            raise self._error
        if not self._gate.enter(self._name):
            return self._nothing
        start = time.monotonic()
        made = self._call(batch)
        seconds = time.monotonic() - start
        self._gate.leave(self._name, rows=made.num_rows, seconds=seconds)
        return made


class _Execution:
    """A chain at work. Its bundles come through a thread, so that who takes them can look up."""

    def __init__(self, chain: ray.data.Dataset) -> None:
        # `Dataset.iter_internal_ref_bundles` starts the same two, waits for the first bundle, and
        # gives nothing by which the work could be ended before it is over.
        self._executor = chain._create_executor()
        self._bundles = chain._build_bundle_iterator(self._executor)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=BUNDLES_AHEAD)
        self._is_closed = threading.Event()
        self._error: Exception | None = None
        self._pump = threading.Thread(target=self._run, name="lavaflow-bundles", daemon=True)
        self.is_over = False
        self.rows = 0
        """Of the bundles that were taken."""

    def take(self, *, timeout_s: float) -> Any:
        """The next bundle; None where none comes in time, or `is_over` now."""
        try:
            bundle = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.is_over = bundle is None
        self.rows += 0 if bundle is None else bundle.num_rows()
        return bundle

    def raise_error(self) -> None:
        """Raise what has ended the work early, if anything has."""
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            for bundle in self._bundles:
                self._put(bundle)
        except Exception as error:  # noqa: BLE001 (raised by whoever takes the bundles)
            self._error = error
        self._put(None)

    def _put(self, bundle: Any) -> None:
        while not self._is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(bundle, timeout=TICK_S)
                return

    def __enter__(self) -> Self:
        self._pump.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        # Forced: actors that are still at work, or still being built, would stay for a while.
        self._executor.shutdown(force=True)
        self._pump.join(JOIN_S)


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What Ray Data says of its doings is in the session's ray-data.log; errors are raised as well.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)


def _bound(bytes_in_flight: int) -> None:
    """Ray Data begins nothing new while more than this lies in its object store."""
    limits = ray.data.ExecutionResources(object_store_memory=bytes_in_flight)
    ray.data.DataContext.get_current().execution_options.resource_limits = limits


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
