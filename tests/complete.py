"""Jobs whose answers are all there, though no model has given them; running them again."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commit import AnswerTable
from pipeline.fingerprint import model_fingerprint, question_fingerprints
from pipeline.footer import Fingerprint
from pipeline.lease import hold
from pipeline.sources import open_source
from pipeline.sources.base import Shard
from pipeline.write import write_part
from schemas.job import JobSpec
from tests.answered import answered, row
from tests.processes import REPOSITORY, write_spec
from tests.shards import sample_members, tar_bytes
from tests.whole_jobs import job_of

ROWS_PER_FILE = 1000
SHARDS_PER_PART = 100


AUDITED = """
import json, sys
source, told, *command = sys.argv[1:]
seen = {"opened": 0, "ray": False}

def count(event, args):
    seen["opened"] += event == "open" and str(args[0]).startswith(source)

sys.addaudithook(count)
from jobs.cli import main
try:
    main(command)
finally:
    json.dump({**seen, "ray": "ray" in sys.modules}, open(told, "w"))
"""


@dataclass(frozen=True)
class Ended:
    """A command that is over. `opened`: shards, as Python's audit events tell it."""

    elapsed_s: float
    status: int
    said: str
    opened: int
    ray: bool


def resumed(folder: Path, *, shards: int, images: int, repeats: int) -> Ended:
    """The quickest of some runs of a job whose output is complete, or one with a fault."""
    job = complete_job(folder, shards=shards, images=images)
    spec = write_spec(job, folder / "job.json")
    runs = [audited(folder, "run", str(spec)) for _ in range(repeats)]
    return min(runs, key=lambda run: (-run.status, -run.opened, -run.ray, run.elapsed_s))


def audited(folder: Path, *command: str) -> Ended:
    """A command on the job of `complete_job(folder)`."""
    source, seen = folder / "in", folder / "seen"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(source), str(seen), *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    elapsed_s = time.monotonic() - start
    values = json.loads(seen.read_text())
    return Ended(elapsed_s, done.returncode, done.stdout + done.stderr, **values)


def complete_job(folder: Path, *, shards: int, images: int) -> JobSpec:
    """A job whose answers are all there, though no model has given them."""
    tar = tar_bytes(sample_members(images))
    (folder / "in").mkdir(parents=True)
    for number in range(shards):
        (folder / f"in/{number:06}.tar").write_bytes(tar)
    job = job_of(
        folder / "in",
        folder / "out",
        ask=[{"id": "shape", "prompt": "what shape is present?"}],
        output={"path": str(folder / "out"), "rows_per_file": ROWS_PER_FILE},
    )
    there = open_source(job.source).list()
    fingerprint = Fingerprint(model_fingerprint(job), question_fingerprints(job))
    table = AnswerTable(job.output, keep={}, fingerprint=fingerprint)
    with hold(table.output, run_id="made", timeout_s=60, say=print) as lease:
        table.recover(lease)
        table.open(there)
        for start in range(0, shards, SHARDS_PER_PART):
            rows = answered(*(rows_of(s, images) for s in there[start : start + SHARDS_PER_PART]))
            table.commit(write_part(rows, output=job.output, keep={}, fingerprint=fingerprint))
            table.fold()
        table.finish()
    return job


def rows_of(shard: Shard, images: int) -> list[dict[str, Any]]:
    """The answers of a shard and its end mark."""
    place = {"source_uri": shard.uri, "shard_identity": shard.identity}
    rows = [each for index in range(images) for each in row(index, ["shape"], **place)]
    return [*rows, {**place, "rows_total": images}]
