"""Runs a job: plan, hold the output, answer what is missing, fold, record.

The output is the checkpoint: whatever ends a run early, the same command goes on from what is
durable.
"""

import contextlib
import datetime
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa
from rich.console import Console

from jobs.domain import warning_of
from jobs.exits import Terminated
from jobs.plan import Plan, plan
from jobs.progress import Progress
from jobs.records import RUNNING, failure_lines
from jobs.secrets import recorded, told_record, without_secrets
from jobs.stop import Stop
from jobs.tolerance import Tolerance
from pipeline.commit import AnswerTable, write_run_record
from pipeline.footer import STATUSES, Footer, Tally
from pipeline.lease import Lease, hold
from pipeline.parts import ANSWERS
from pipeline.read import ShardWork
from pipeline.resources import Resources, check_fits, resolve_resources
from pipeline.storage import Output, store_errors
from pipeline.write import store_failures_as_job_errors
from schemas.errors import JobError, SpecError
from schemas.job import JobSpec, OutputSpec

if TYPE_CHECKING:
    from pipeline import flow

MOST_PASSES = 3
"""In a row that bring nothing. A pass answers whatever no part covers; rows are left over where a
store has failed."""
PAUSE_S = 5.0
"""Between passes, times one more than those that brought nothing: a store is given time."""
TICK_S = 0.25

RECORDED_VERSIONS = ("lavaflow", "ray", "torch", "transformers", "pyarrow", "pillow")


@dataclass(frozen=True)
class RunResult:
    """How a run ended; `record` is what `runs/RUN_ID.json` holds."""

    record: Mapping[str, Any]
    too_many_failed: bool


@dataclass(frozen=True)
class Retry:
    """What a run does that answers failed rows again: those of these classes, or all."""

    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fork:
    """What a run does that begins with what still holds of another table."""

    origin: OutputSpec


@dataclass(frozen=True)
class Force:
    """What a run does that replaces what was answered otherwise, part by part."""


Mode = Retry | Fork | Force


def run_job(
    job: JobSpec, *, address: str | None, console: Console, mode: Mode | None = None
) -> RunResult:
    """Answer everything that the job asks and its output does not hold yet; or what has failed.

    Raises SpecError before anything is answered, OutputHeld where another run holds the output,
    JobError where the job cannot go on. Stopped by a signal, it raises KeyboardInterrupt or
    Terminated when what was in flight is durable.
    """
    start = time.monotonic()
    planned = plan(job)
    run = _Run(planned, planned.table(), console, Stop(grace_s=job.grace_period_s), mode)
    run.seconds["plan"] = time.monotonic() - start
    with run.stop, store_failures_as_job_errors(run.table.output), run.hold() as lease:
        with run.timed("open"):
            if isinstance(mode, Force):
                run.table.force()
            run.table.recover(lease)
            run.table.open(planned.shards, on_change=job.source.on_change)
            run.begin()
        return run.to_its_end(lease, address)


@dataclass
class _Run:
    """One run in the making: what it has done so far."""

    plan: Plan
    table: AnswerTable
    console: Console
    stop: Stop
    mode: Mode | None = None
    run_id: str = field(default_factory=lambda: new_run_id())
    started_at: datetime.datetime = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC)
    )
    first_answer_s: float | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    tally_before: Tally = field(default_factory=Tally)
    removed: Tally = field(default_factory=Tally)
    taken: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        self._durable = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self._tolerance = Tolerance(self.plan.job.max_failed_fraction, self.plan.most_answers)
        # A large file is listed in pieces.
        self._shards = len({shard.uri for shard in self.plan.shards})

    def hold(self) -> contextlib.AbstractContextManager[Lease]:
        timeout_s = self.plan.job.output.lease_timeout_s
        return hold(self.table.output, run_id=self.run_id, timeout_s=timeout_s, say=self._say)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start

    def begin(self) -> None:
        """Bring the table to where the work begins: what is stale is gone, or all is folded."""
        self.tally_before = self.table.tally
        if self.retry:
            self.table.finish()
            return
        self.table.replace_failed()
        self.removed = self.table.remove_stale()
        if isinstance(self.mode, Fork):
            self._take_over(self.mode.origin)
        self.tally_before = self.table.tally
        if self.removed.rows:
            self._say(
                f"{self.removed.rows:,} answers are removed, about shards that have changed since "
                "or are gone (source.on_change)"
            )

    def _take_over(self, origin: OutputSpec) -> None:
        other = Output(origin.path, origin.storage, retry_s=origin.retry_s)
        self.taken = self.table.take_over(other)
        self._say(f"{self.taken.rows:,} answers of {other.uri} still hold and are taken over")

    @property
    def retry(self) -> Retry | None:
        return self.mode if isinstance(self.mode, Retry) else None

    def to_its_end(self, lease: Lease, address: str | None) -> RunResult:
        """Answer, fold and record; the table is open."""
        try:
            with store_failures_as_job_errors(self.table.output):
                if work := self._work():
                    work = self._answer(work, lease, address)
                if work:
                    self._end_early(work)
                with self.timed("fold"):
                    self.table.finish()
        except BaseException as error:
            record = self.record(ended=_ended(error), patience_s=0.0)
            self._say(f"{self.table.tally.rows:,} answers are durable")
            for line in failure_lines(record["failures"]):
                self._say(line)
            raise
        return RunResult(
            self.record(ended="complete"), self._tolerance.is_exceeded(self.table.tally)
        )

    def _work(self) -> list[ShardWork]:
        if self.retry:
            failed = self.table.failed(classes=self.retry.classes, but_run=self.run_id)
            return [
                ShardWork(shard, again.done, again.own)
                for shard in self.plan.shards
                if (again := failed.get(shard.uri)) and again.done.identity == shard.identity
            ]
        return self.plan.work(self.table.coverage, self.table.versions)

    def _answer(self, work: list[ShardWork], lease: Lease, address: str | None) -> list[ShardWork]:
        """Answer the shards; returns what is left of them."""
        self.record(ended=RUNNING)
        if warning := warning_of(self.plan.job, work):
            self.console.print(
                warning, style="bold yellow", soft_wrap=True, highlight=False, markup=False
            )
        for note in self.plan.notes:
            self._say(note)
        left = len({item.shard.uri for item in work})
        self._say(f"{self._told(left)} to answer; starting Ray")
        # Imported here: a run with nothing to do should not wait for ray.
        from pipeline import flow
        from pipeline.session import session

        with (
            _sigterm_while_ray_starts(),
            session(address) as cluster,
            Progress(self.console) as progress,
        ):
            self.stop.listen()
            run = flow.Run(
                job=self._job_to_read(),
                keep=self.plan.keep,
                run_id=self.run_id,
                fingerprint=self.plan.fingerprint,
                resources=self._resources(cluster, is_ours=not address),
                again=self.retry is not None,
            )
            progress.start(self._shards, self._shards - left, most_answers=self._most_new())
            in_vain = 0
            while work and in_vain < MOST_PASSES and not self.stop.is_asked:
                answered = self._answered()
                steps = flow.answer(run, work, stop=self.stop.asked, say=self._say)
                with contextlib.closing(steps):
                    for step in steps:
                        self._take(step, lease, progress)
                in_vain = in_vain + 1 if self._answered() == answered else 0
                if work := self._work():
                    self._pause((in_vain + 1) * PAUSE_S)
        return work

    def _job_to_read(self) -> JobSpec:
        """A retry knows the rows that it wants: it need not count the first ones."""
        job = self.plan.job
        if self.retry is None:
            return job
        return job.model_copy(update={"source": job.source.model_copy(update={"limit": None})})

    def _answered(self) -> int:
        """Grows as long as a pass brings anything."""
        return self._durable if self.retry else self.table.tally.rows

    def _told(self, left: int) -> str:
        if self.retry:
            return f"{left:,} shards with failed rows"
        limit = self.plan.job.source.limit
        if limit is not None:
            return f"The first {limit:,} rows of {self._shards:,} shards"
        return f"{left:,} of {self._shards:,} shards"

    def _most_new(self) -> int | None:
        most = self.plan.most_answers
        return None if most is None or self.retry else max(most - self.tally_before.rows, 0)

    def _end_early(self, work: Sequence[ShardWork]) -> NoReturn:
        if self._is_hopeless():
            self.table.finish()
            raise JobError(self._tolerance.told(self.table.tally))
        if self.stop.is_asked:
            self.table.close()
            raise self.stop.reason
        raise JobError(
            f"{work[0].shard.uri} and {len(work) - 1} more shards could not be read to their end: "
            f"{MOST_PASSES} passes in a row have brought nothing; see that the store can be "
            "reached and run the same command again: it goes on from here"
        )

    def _is_hopeless(self) -> bool:
        return self.retry is None and self._tolerance.is_hopeless(self.table.tally)

    def _resources(self, cluster: Mapping[str, float], *, is_ours: bool) -> Resources:
        """A machine cannot grow; a cluster may, so there a warning has to do."""
        resources = resolve_resources(self.plan.job.resources, cluster)
        self.resources = {**vars(resources), "cluster": _plain(cluster)}
        try:
            check_fits(resources, cluster)
        except SpecError as error:
            if is_ours:
                raise
            self._say(f"Waiting until the cluster has grown: {error}")
        return resources

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stop.is_asked:
            time.sleep(min(TICK_S, seconds))

    def _take(self, step: "flow.Step", lease: Lease, progress: Progress) -> None:
        if lease.lost:
            raise lease.lost
        if self.first_answer_s is None and (step.waiting or step.receipt.num_rows):
            self.first_answer_s = self._elapsed_s()
        for stage, seconds in step.seconds.items():
            self.seconds[stage] += seconds
        progress.wait(step.waiting)
        if step.receipt.num_rows:
            self._commit(step.receipt, progress)
            if self._is_hopeless():
                self.stop.asked.set()

    def _commit(self, receipt: pa.Table, progress: Progress) -> None:
        table, units = self.table, self.plan.job.units
        parts = [
            Footer.from_bytes(f.encode(), name="receipt") for f in receipt["footer"].to_pylist()
        ]
        touched = {(shard.uri, shard.identity) for part in parts for shard in part.shards}
        done_before = sum(table.coverage.of(*key).is_complete(units) for key in touched)
        table.commit(receipt)
        if not self.stop.is_asked:
            with self.timed("fold"):
                table.fold()
        done = sum(table.coverage.of(*key).is_complete(units) for key in touched)
        counts = sum((part.tally for part in parts), Tally()).counts
        self._durable += sum(counts.values())
        progress.advance(**counts, shards_done=done - done_before)

    def record(self, *, ended: str, patience_s: float | None = None) -> dict[str, Any]:
        """Write and return what happened; where the store refuses, say so and go on."""
        tally, before = self.table.tally, self.tally_before
        spec, withheld = recorded(self.plan.job)
        elapsed_s = self._elapsed_s()
        new = {status: tally.counts[status] - before.counts[status] for status in STATUSES}
        new["failed"] += self.table.swapped
        record = {
            "run_id": self.run_id,
            "job": self.plan.job.name,
            "ended": ended,
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "elapsed_s": round(elapsed_s, 3),
            "first_answer_s": self.first_answer_s and round(self.first_answer_s, 3),
            "answers_per_s": round(sum(new.values()) / elapsed_s, 3) if elapsed_s else 0.0,
            "seconds": {stage: round(seconds, 6) for stage, seconds in self.seconds.items()},
            "table": f"{self.table.output.uri}/{ANSWERS}",
            "shards": self._shards,
            "counts": dict(tally.counts),
            "new": new,
            "removed": dict(self.removed.counts),
            "taken": dict(self.taken.counts),
            "retried": self.table.swapped,
            "failures": {name: found.to_json() for name, found in tally.failures.items()},
            "fingerprint": self.plan.fingerprint.to_json(),
            "resources": self.resources,
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "spec": spec,
            "withheld": withheld,
        }
        record = told_record(record)
        output = self.table.output
        if patience_s is not None:
            output = output.with_patience(patience_s)
        try:
            write_run_record(output, self.run_id, record)
        except store_errors() as error:
            self._say(f"could not write runs/{self.run_id}.json: {error}")
        return record

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def _say(self, text: str) -> None:
        text = without_secrets(text)
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _sigterm_while_ray_starts() -> Iterator[None]:
    """Until Ray has started, its own handler is in place."""
    try:
        yield
    except SystemExit as error:
        raise Terminated from error


def _ended(error: BaseException) -> str:
    names = {KeyboardInterrupt: "interrupted", Terminated: "terminated"}
    return names.get(type(error)) or f"{type(error).__name__}: {error}".removesuffix(": ")


def new_run_id() -> str:
    """Sorts by time, and is nobody else's."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S%f}Z-{uuid.uuid4().hex[:6]}"


def _plain(cluster: Mapping[str, float]) -> dict[str, float]:
    return {name: cluster.get(name, 0.0) for name in ("CPU", "GPU")}
