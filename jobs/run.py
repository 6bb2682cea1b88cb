"""Runs a job: plan, answer what is missing, fold, record.

The output is the checkpoint: whatever ends a run early, the same command goes on from what is
durable. One run per output is assumed, not yet enforced.
"""

import contextlib
import datetime
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa
from rich.console import Console

from jobs.domain import warning_of
from jobs.exits import terminate
from jobs.plan import Plan, plan
from jobs.progress import Progress
from pipeline.commit import write_run_record
from pipeline.footer import STATUSES, Footer, Tally
from pipeline.parts import ANSWERS
from pipeline.resources import Resources, check_fits, resolve_resources
from pipeline.storage import store_errors
from schemas.errors import JobError, SpecError
from schemas.job import JobSpec

MOST_PASSES = 3
"""A pass answers whatever no part covers; rows are left over where a store has failed."""
PAUSE_S = 5.0
"""Between passes, times their number: a store that fails is given time."""

RECORDED_VERSIONS = ("lavaflow", "ray", "torch", "transformers", "pyarrow", "pillow")


@dataclass(frozen=True)
class RunResult:
    """How a run ended; `record` is what `runs/RUN_ID.json` holds."""

    record: Mapping[str, Any]
    too_many_failed: bool


def run_job(job: JobSpec, *, address: str | None, console: Console) -> RunResult:
    """Answer everything that the job asks and its output does not hold yet.

    Raises SpecError before anything is answered, JobError where the job cannot go on.
    """
    planned = plan(job)
    run = _Run(planned, console)
    try:
        with _store_failures_as_job_errors(planned):
            run.answer(address)
            planned.table.finish()
    except BaseException as error:
        run.record(ended=f"{type(error).__name__}: {error}".removesuffix(": "))
        raise
    return RunResult(run.record(ended="complete"), run.too_many_failed())


@dataclass
class _Run:
    """One run in the making: what it has done so far."""

    plan: Plan
    console: Console
    run_id: str = field(default_factory=lambda: new_run_id())
    started_at: datetime.datetime = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC)
    )
    first_answer_s: float | None = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    tally_before: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally_before = self.plan.table.tally
        self._start = time.monotonic()

    def answer(self, address: str | None) -> None:
        if not (work := self.plan.work()):
            return
        self.record(ended="running")
        if warning := warning_of(self.plan.job, work):
            self.console.print(
                warning, style="bold yellow", soft_wrap=True, highlight=False, markup=False
            )
        self._say(f"{len(work):,} of {len(self.plan.shards):,} shards to answer; starting Ray")
        # Imported here: a run with nothing to do should not wait for ray.
        from pipeline import flow

        with flow.session(address) as cluster:
            _raise_on_sigterm()
            resources = resolve_resources(self.plan.job.resources, cluster)
            self._check_fits(resources, cluster, is_ours=not address)
            self.resources = {**vars(resources), "cluster": _plain(cluster)}
            run = flow.Run(
                job=self.plan.job,
                keep=self.plan.keep,
                run_id=self.run_id,
                fingerprint=self.plan.fingerprint,
                resources=resources,
            )
            with Progress(self.console) as progress:
                progress.start(len(self.plan.shards), len(self.plan.shards) - len(work))
                for number in range(MOST_PASSES):
                    time.sleep(number * PAUSE_S)
                    for receipt in flow.answer(run, work):
                        self._commit(receipt, progress)
                    if not (work := self.plan.work()):
                        return
        raise JobError(
            f"{work[0].shard.uri} and {len(work) - 1} more shards could not be read to their end "
            f"in {MOST_PASSES} passes; see that the store can be reached and run the same command "
            "again: it goes on from here"
        )

    def _check_fits(
        self, resources: Resources, cluster: Mapping[str, float], *, is_ours: bool
    ) -> None:
        """A machine cannot grow; a cluster may, so there a warning has to do."""
        try:
            check_fits(resources, cluster)
        except SpecError as error:
            if is_ours:
                raise
            self._say(f"Waiting until the cluster has grown: {error}")

    def _commit(self, receipt: pa.Table, progress: Progress) -> None:
        if self.first_answer_s is None:
            self.first_answer_s = self._elapsed_s()
        table, units = self.plan.table, self.plan.job.units
        parts = [
            Footer.from_bytes(f.encode(), name="receipt") for f in receipt["footer"].to_pylist()
        ]
        touched = {(shard.uri, shard.identity) for part in parts for shard in part.shards}
        done_before = sum(table.coverage.of(*key).is_complete(units) for key in touched)
        table.commit(receipt)
        table.fold()
        done = sum(table.coverage.of(*key).is_complete(units) for key in touched)
        counts = sum((part.tally for part in parts), Tally()).counts
        progress.advance(**counts, shards_done=done - done_before)

    def too_many_failed(self) -> bool:
        tally = self.plan.table.tally
        return tally.counts["failed"] > self.plan.job.max_failed_fraction * tally.rows

    def record(self, *, ended: str) -> dict[str, Any]:
        """Write and return what happened; where the store refuses, say so and go on."""
        tally, before = self.plan.table.tally, self.tally_before
        elapsed_s = self._elapsed_s()
        new = {status: tally.counts[status] - before.counts[status] for status in STATUSES}
        record = {
            "run_id": self.run_id,
            "job": self.plan.job.name,
            "ended": ended,
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "elapsed_s": round(elapsed_s, 3),
            "first_answer_s": self.first_answer_s and round(self.first_answer_s, 3),
            "answers_per_s": round(sum(new.values()) / elapsed_s, 3) if elapsed_s else 0.0,
            "table": f"{self.plan.table.output.uri}/{ANSWERS}",
            "shards": len(self.plan.shards),
            "counts": dict(tally.counts),
            "new": new,
            "failures": {name: found.to_json() for name, found in tally.failures.items()},
            "fingerprint": self.plan.fingerprint.to_json(),
            "resources": self.resources,
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "spec": self.plan.job.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        }
        try:
            write_run_record(self.plan.table.output, self.run_id, record)
        except store_errors() as error:
            self._say(f"could not write runs/{self.run_id}.json: {error}")
        return record

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _store_failures_as_job_errors(planned: Plan) -> Iterator[None]:
    try:
        yield
    except store_errors() as error:
        raise JobError(
            f"{planned.table.output.uri}: the store failed: {error}; run the same command again: "
            "it goes on from here"
        ) from error


def new_run_id() -> str:
    """Sorts by time, and is nobody else's."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S%f}Z-{uuid.uuid4().hex[:6]}"


def _raise_on_sigterm() -> None:
    """Ray puts a handler in place that exits with the signal's number; ours cleans up."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def _plain(cluster: Mapping[str, float]) -> dict[str, float]:
    return {name: cluster.get(name, 0.0) for name in ("CPU", "GPU")}
