"""A table that is asked for every night, over a source that is another one each time.

Each night adds a shard, changes one and removes one; the run is killed at a random moment, and
another one ends it. What was opened is counted: shards that are as they were are none of it.
"""

import random
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import AnswerTable
from pipeline.fingerprint import model_fingerprint, question_fingerprints
from pipeline.footer import Fingerprint
from pipeline.lease import hold
from pipeline.sources import open_source
from pipeline.write import write_part
from schemas.ask import AskPrompt
from tests.answered import answered, row
from tests.kills import read_log
from tests.scenes import QUESTIONS, Scene, scene
from tests.shards import json_bytes, write_shard
from tests.watch import Watch, wait_until, watching
from tests.whole_jobs import job_of
from tests.whole_jobs import scene as drawn

Figures = dict[str, Any]

ROWS_PER_FILE = 50
ROWS_AT_ONCE = 10_000


def nights(folder: Path, *, nights: int, images: int, row_s: float, seed: int = 0) -> Figures:
    """The first night is calm. `images`: of each shard, about."""
    rng = random.Random(seed)
    it = scene(folder, shards=4, images=images, rows_per_file=ROWS_PER_FILE)
    with it.run() as run:
        status, said = run.wait()
    faults = [said] if status else []
    killed_at_work = opened = 0
    for night in range(nights):
        fresh = _change(folder / "in", night, rng, images=images)
        it = replace(it, answers=QUESTIONS * _rows_of(folder / "in"))
        start = time.time()
        watch = replace(it.watch(), may_change=True)
        with watching(watch):
            with it.run(row_s=row_s) as run:
                time.sleep(rng.uniform(0, 5))
                _wait_for_work(it, run, start, at_most_s=rng.uniform(0, 20))
                killed_at_work += run.process.poll() is None
                run.kill()
            with it.run(row_s=row_s) as run:
                status, said = run.wait()
        lines = [line for line in read_log(it.log) if line.at >= start]
        there = {line.identity[0] for line in lines if line.event == "opened"}
        opened += len(there)
        faults += [said] if status else []
        faults += [f"night {night}: {fault}" for fault in (*watch.faults, *it.faults())]
        if odd := there - fresh:
            faults.append(f"night {night}: opened though unchanged: {sorted(odd)}")
    return {
        "nights": nights,
        "killed_at_work": killed_at_work,
        "shards": len(list((folder / "in").iterdir())),
        "shards_opened": opened,
        "answers": it.answers,
        "faults": faults,
    }


def _wait_for_work(it: Scene, run: Any, start: float, *, at_most_s: float) -> None:
    end = time.time() + at_most_s

    def is_over() -> bool:
        lines = read_log(it.log)
        is_at_work = bool(lines) and lines[-1].at >= start
        return time.time() > end or run.process.poll() is not None or is_at_work

    wait_until(is_over, timeout_s=60)


def _change(folder: Path, night: int, rng: random.Random, *, images: int) -> set[str]:
    """Add, change and remove a shard; the URIs of those that have to be read."""
    there = sorted(folder.iterdir())
    changed, gone = rng.sample(there, 2)
    gone.unlink()
    added = folder / f"night-{night:03}.tar"
    for shard in (changed, added):
        _write(shard, first=rng.randrange(24), images=images + rng.randrange(4))
    return {str(changed), str(added)}


def _write(shard: Path, *, first: int, images: int) -> None:
    questions = json_bytes({"questions": [{"id": "colour", "question": "what color is it?"}]})
    members: list[tuple[str, bytes]] = []
    for index in range(images):
        members += [(f"{index:03}.png", drawn(first + index)[2]), (f"{index:03}.json", questions)]
    write_shard(shard, members)


def _rows_of(folder: Path) -> int:
    """Two members a row."""

    def members(path: Path) -> int:
        with tarfile.open(path) as tar:
            return len(tar.getnames())

    return sum(members(path) for path in folder.iterdir()) // 2


def added_question(folder: Path, *, images: int) -> Figures:
    """Ask one question more of images that have an answer each; those were given by no model."""
    table = folder / "in" / "images.parquet"
    table.parent.mkdir(parents=True)
    pngs = pa.array([drawn(number % 24)[2] for number in range(24)], pa.binary())
    with pq.ParquetWriter(table, pa.schema([("image", pa.binary())])) as writer:
        for first in range(0, images, ROWS_AT_ONCE):
            some = range(first, min(first + ROWS_AT_ONCE, images))
            writer.write_table(
                pa.table({"image": pngs.take(pa.array([n % 24 for n in some], pa.int64()))})
            )
    old = AskPrompt(id="shape", prompt="what shape is present?")
    new = AskPrompt(id="colour", prompt="what color is the shape?")
    out = {"path": str(folder / "out"), "rows_per_file": ROWS_AT_ONCE}
    source = {"format": "parquet", "path": str(table)}
    job = job_of("", "", source=source, ask=[old.model_dump()], output=out)
    _answer(job, images)
    job = job.model_copy(update={"ask": (old, new)})
    it = Scene(folder, job, answers=2 * images)
    watch = Watch(fsspec.filesystem("file"), str(folder / "out"))
    start = time.monotonic()
    with watching(watch), it.run() as run:
        status, said = run.wait(timeout_s=3600)
    lines = read_log(it.log)
    begun = [line.identity for line in lines if line.event == "begun"]
    faults = [*watch.faults, *it.faults(), *([said] if status else [])]
    if {question for _, _, question in begun} != {"colour"} or len(begun) != images:
        faults.append(f"{len(begun)} answers were begun, to {sorted({q for *_, q in begun})}")
    return {
        "images": images,
        "answers_begun": len(begun),
        "elapsed_s": round(time.monotonic() - start, 1),
        "polls": watch.polls,
        "faults": faults,
    }


def _answer(job: Any, images: int) -> None:
    shards: Sequence[Any] = open_source(job.source).list()
    place = {"uri": shards[0].uri, "shard_identity": shards[0].identity}
    fingerprint = Fingerprint(model_fingerprint(job), question_fingerprints(job))
    table = AnswerTable(job.output, keep={}, fingerprint=fingerprint)
    with hold(table.output, run_id="made", timeout_s=60, say=print) as lease:
        table.recover(lease)
        table.open(shards)
        for first in range(0, images, ROWS_AT_ONCE):
            some = range(first, min(first + ROWS_AT_ONCE, images))
            rows = answered(*(row(n, ["shape"], rows_total=images, **place) for n in some))
            table.commit(write_part(rows, output=job.output, keep={}, fingerprint=fingerprint))
            table.fold()
        table.finish()
