"""Runs of the commit that die, or sleep, at an exact step of it; a process each.

    python -m tests.commit_steps FOLDER_OR_URL --act kill|sleep [--night NAME] [--every N]

A step is one thing that the store is made to do: a link, a rename, a sync, a removal, an upload.
`kill`: the run is ended by SIGKILL before or after the step, and another run follows. `sleep`: it
is stopped there, another run takes the output over and completes it, then the first goes on.
After each the table is compared with what it has to hold. Prints JSON; ends with 1 on a fault.
`--night changed`: the output is complete, and the source is another one since; `retried`: what
failed in it is answered again; `forked`: it begins another table, for which a question has changed;
`forced`: so it has, and the table is replaced.
Real processes, forked from this one, which keeps clear of threads and stores.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import ledger
from pipeline.commit import AnswerTable
from pipeline.coverage import ShardCoverage
from pipeline.intents import INTENTS
from pipeline.lease import hold
from pipeline.parts import ANSWERS, STAGING, read_part
from pipeline.sources.base import Shard
from pipeline.storage import Output
from pipeline.write import write_part
from schemas.errors import OutputHeld
from schemas.job import OutputSpec, StorageSpec
from tests.answered import FINGERPRINT, IDENTITY, answered, end, failed, row

HELD = 75
ROWS_PER_FILE, NEXT_ROWS_PER_FILE = 5, 8
"""The run that follows groups otherwise: only what the first one recorded may look like it."""
BATCH = 3
UNITS = ["caption", "colour", "questions"]
LOCAL_STEPS = ("link", "replace", "unlink", "remove", "fsync")
REMOTE_STEPS = ("_upload_new", "_upload_over", "replace", "remove")

Place = tuple[str, int]


def rows_at(uri: str, index: int, version: str) -> list[dict[str, Any]]:
    """All answers of a source row: of three kinds, in turn."""
    place = {"uri": uri, "shard_identity": version, "run_id": version}
    if index % 3 == 0:
        own = [f"own-{number}" for number in range(index % 4)] or [None]
        status = {} if index % 4 else {"status": "skipped", "answer": None}
        return row(index, ["caption", "colour", *own], units=UNITS, **place, **status)
    if index % 3 == 1:
        return failed(index, units=UNITS, **place)
    return row(index, ["caption", "colour", "own"], units=UNITS, **place)


@dataclass(frozen=True)
class Night:
    """A source: of each shard its version, and how many rows it has."""

    shards: Mapping[str, tuple[str, int]]
    new: int
    """Rows and ends of shards that are not answered yet."""

    @property
    def listed(self) -> list[Shard]:
        return [Shard(uri, version) for uri, (version, _) in self.shards.items()]

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        places = (
            (uri, index, each["question_id"], version)
            for uri, (version, length) in self.shards.items()
            for index in range(length)
            for each in rows_at(uri, index, version)
        )
        return sorted(places, key=str)

    def missing(self, table: AnswerTable) -> Iterator[list[dict[str, Any]]]:
        """The source rows and the end marks that nothing covers."""
        for uri, (version, length) in self.shards.items():
            known: ShardCoverage = table.coverage.of(uri, version)
            done = known.answered_rows(UNITS)
            for index in range(length):
                if index not in done:
                    yield rows_at(uri, index, version)
            if known.rows_total is None:
                yield [{**each, "shard_identity": version} for each in end(length, uri=uri)]


class Retried(Night):
    """Failed rows are answered again, each of which stands for all questions of its source row."""

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        good = [place for place in super().expected if place[1] % 3 != 1]
        failed = (place for place in super().expected if place[1] % 3 == 1)
        return sorted([*good, *((*p[:2], i, AGAIN) for p in failed for i in ANSWERED)], key=str)

    def missing(self, table: AnswerTable) -> Iterator[list[dict[str, Any]]]:
        for uri, again in table.failed(but_run=AGAIN).items():
            done = again.done.answered_rows(UNITS)
            for index in range(self.shards[uri][1]):
                if index not in done:
                    yield row(index, ANSWERED, uri=uri, units=UNITS, run_id=AGAIN)


class Forked(Night):
    """Of source rows with an answer that stands for several questions, nothing is taken over."""

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        old = super().expected
        whole = {place[:2] for place in old if place[2] is None}
        fresh = {place for place in old if place[:2] in whole or place[2] == "colour"}
        return sorted(((*p[:3], FORKED) if p in fresh else p for p in old), key=str)

    def missing(self, table: AnswerTable) -> Iterator[list[dict[str, Any]]]:
        for uri, (version, length) in self.shards.items():
            known = table.coverage.of(uri, version)
            for index in range(length):
                units = known.missing_units(index, UNITS)
                rows = [r for r in rows_at(uri, index, version) if unit_of(r) in (None, *units)]
                told = {"units": units, "row_answers": len(rows), "run_id": FORKED}
                if units:
                    yield [{**each, **told} for each in rows]


class Forced(Night):
    """Everything is answered anew; all along, a reader finds all answers, old or new."""

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        return sorted(((*place[:3], FORCED) for place in super().expected), key=str)

    def missing(self, table: AnswerTable) -> Iterator[list[dict[str, Any]]]:
        for rows in super().missing(table):
            yield [{**each, "run_id": FORCED} if "run_id" in each else each for each in rows]


def unit_of(answer: dict[str, Any]) -> str | None:
    question_id = answer["question_id"]
    return question_id if question_id in (None, "caption", "colour") else "questions"


FORKED, FORCED = "forked", "forced"
OTHER = replace(FINGERPRINT, questions={**FINGERPRINT.questions, "colour": "k2"})
AGAIN, ANSWERED = "again", ["caption", "colour", "own"]
FIRST = Night({"a.tar": (IDENTITY, 6), "b.tar": (IDENTITY, 3), "c.tar": (IDENTITY, 0)}, new=12)
CHANGED = Night({"a.tar": (IDENTITY, 6), "b.tar": ("etag-2", 4), "d.tar": (IDENTITY, 1)}, new=7)
RETRIED = Retried({**FIRST.shards}, new=3)
FORK = Forked({**FIRST.shards}, new=9)
FORCE = Forced({**FIRST.shards}, new=12)
NIGHTS = {
    "first": FIRST,
    "changed": CHANGED,
    "retried": RETRIED,
    "forked": FORK,
    "forced": FORCE,
}


def run(spec: OutputSpec, night: Night, *, answered_log: Path) -> None:
    """Answer what is missing, in batches; every second one is staged again with other borders."""
    ledger.UNRECORDED_PARTS = 1
    fingerprint = OTHER if isinstance(night, Forked | Forced) else FINGERPRINT
    table = AnswerTable(spec, keep={}, fingerprint=fingerprint)
    if isinstance(night, Forced):
        table.force()
    options = {"run_id": f"run-{os.getpid()}", "timeout_s": spec.lease_timeout_s}
    with hold(table.output, say=lambda _: None, **options) as lease:
        table.recover(lease)
        table.open(night.listed)
        is_retry = isinstance(night, Retried)
        if is_retry:
            table.finish()
        else:
            table.replace_failed()
            table.remove_stale()
        if isinstance(night, Forked):
            table.take_over(Output(origin_of(spec).path, spec.storage))
        for number in itertools.count():
            batch = list(itertools.islice(night.missing(table), BATCH))
            if not batch:
                break
            with answered_log.open("a") as log:
                log.write("row\n" * len(batch))
            for repeated in (batch, batch[1:])[: 1 + number % 2]:
                rows = answered(*repeated)
                settings = {"keep": {}, "fingerprint": fingerprint, "again": is_retry}
                table.commit(write_part(rows, output=spec, **settings))
            table.fold()
        table.finish()


def origin_of(spec: OutputSpec) -> OutputSpec:
    return spec.model_copy(update={"path": f"{spec.path}-origin"})


def check_table(
    output: Output, night: Night, *, has_all: bool = False, is_tidy: bool = False
) -> None:
    """What a reader of the table sees at this moment. Raises AssertionError."""
    tables = [read_part(output, name)[0] for name in output.names(ANSWERS, suffix="")]
    rows = [r for table in tables for r in table.to_pylist()]
    there = [(r["source_uri"], r["source_index"], r["question_id"], r["run_id"]) for r in rows]
    identities = [place[:3] for place in there]
    assert len(identities) == len(set(identities)), f"doubled: {sorted(there, key=str)}"
    if night is FORCE:
        gone = {place[:3] for place in FIRST.expected} - set(identities)
        assert not gone, f"gone: {sorted(gone, key=str)}"
    most = NEXT_ROWS_PER_FILE * (len(ANSWERED) if isinstance(night, Retried) else 1)
    assert all(table.num_rows <= most for table in tables)
    if night is not FIRST and night is not FORK:
        stand = {place for place in night.expected if place in FIRST.expected}
        assert stand <= set(there), f"gone: {sorted(stand - set(there), key=str)}"
    if has_all:
        assert sorted(there, key=str) == night.expected
    if is_tidy:
        for folder in (STAGING, INTENTS):
            assert output.names(folder, suffix="") == [], f"left in {folder}"


class Interruption:
    """Acts on this process at the `number`th step, before or after it."""

    def __init__(self, number: int, *, is_after: bool, act: int) -> None:
        self._number, self._is_after, self._act = number, is_after, act
        self._count = 0
        self._lock = threading.Lock()

    def install(self, *, is_local: bool) -> None:
        owner: Any = os if is_local else Output
        for name in LOCAL_STEPS if is_local else REMOTE_STEPS:
            setattr(owner, name, self._step(getattr(owner, name)))

    def _step(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "lavaflow-lease":
                return call(*args, **kwargs)
            with self._lock:
                self._count += 1
                is_now = self._count == self._number
            if is_now and not self._is_after:
                os.kill(os.getpid(), self._act)
            result = call(*args, **kwargs)
            if is_now and self._is_after:
                os.kill(os.getpid(), self._act)
            return result

        return step


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does the work and ends with its status."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except OutputHeld:
        status = HELD
    except Exception:  # noqa: BLE001
        # Whatever it is, the parent has to see that it was.
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def complete(spec: OutputSpec, *, log: Path) -> None:
    """The first night, from its beginning to its end."""
    assert ended(forked(lambda: run(spec, FIRST, answered_log=log))) == 0


@dataclass(frozen=True)
class Attempt:
    """One interrupted run at a time, and the run after it."""

    night: Night
    is_after: bool
    is_sleep: bool
    log: Path
    origin: Path | None = None
    """What the first night has left on this machine; without it, each attempt begins with one."""

    def begin(self, spec: OutputSpec) -> None:
        """Bring the output to where the night finds it."""
        if self.night is FIRST:
            return
        first = origin_of(spec) if self.night is FORK else spec
        if self.origin:
            shutil.copytree(self.origin, first.path)
        else:
            complete(first, log=self.log)

    def at(self, number: int, spec: OutputSpec) -> bool:
        """Interrupt at this step; False where there is no such step any more."""
        is_local = "://" not in spec.path
        other = spec.model_copy(update={"rows_per_file": NEXT_ROWS_PER_FILE})
        output = functools.partial(Output, spec.path, spec.storage)

        def first() -> None:
            if self.is_sleep:
                # Seen from another machine: the pid tells the other run nothing.
                socket.gethostname = lambda: "elsewhere"
            act = signal.SIGSTOP if self.is_sleep else signal.SIGKILL
            Interruption(number, is_after=self.is_after, act=act).install(is_local=is_local)
            run(spec, self.night, answered_log=self.log)

        def second() -> None:
            check_table(output(), self.night)
            run(other, self.night, answered_log=self.log)
            check_table(output(), self.night, has_all=True, is_tidy=True)

        def last() -> None:
            # What it still published is no row of the table; what it staged, the next run removes.
            check_table(output(), self.night, has_all=True)
            run(spec, self.night, answered_log=self.log)
            check_table(output(), self.night, has_all=True, is_tidy=True)

        self.begin(spec)
        self.log.write_text("")
        pid = forked(first)
        if self.is_sleep:
            _, status = os.waitpid(pid, os.WUNTRACED)
            is_there = os.WIFSTOPPED(status)
        else:
            is_there = ended(pid) == -signal.SIGKILL
        assert ended(forked(second)) == 0, f"step {number}: the run after it"
        if is_there and self.is_sleep:
            os.kill(pid, signal.SIGCONT)
            assert ended(pid) in (0, HELD), f"step {number}: the run that woke up"
            assert ended(forked(last)) == 0, f"step {number}: the table after it woke up"
        return is_there


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--act", choices=["kill", "sleep"], required=True)
    parser.add_argument("--night", choices=list(NIGHTS), default="first")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--endpoint", default=None)
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    is_sleep = args.act == "sleep"
    night = NIGHTS[args.night]
    attempts, most_again = 0, 0
    origin = None
    if "://" not in args.path and night is not FIRST:
        origin = Path(args.path, "origin")
        complete(OutputSpec(path=str(origin), rows_per_file=ROWS_PER_FILE), log=args.log)
    for is_after in (False, True):
        attempt = Attempt(night, is_after, is_sleep, args.log, origin)
        for number in itertools.count(1, args.every):
            spec = OutputSpec(
                path=f"{args.path}/{'after' if is_after else 'before'}-{number}",
                rows_per_file=ROWS_PER_FILE,
                lease_timeout_s=0.3 if is_sleep else 60,
                storage=StorageSpec(endpoint_url=args.endpoint),
            )
            if not attempt.at(number, spec):
                break
            attempts += 1
            most_again = max(most_again, len(args.log.read_text().split()) - night.new)
    found = {"act": args.act, "attempts": attempts, "most_rows_again": most_again}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
