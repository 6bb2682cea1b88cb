"""Jobs for the runs that are killed: shards of shapes, a log of the engine, local or on S3."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec

from jobs.verify import verify
from schemas.job import JobSpec, StorageSpec
from tests.kills import Orders, read_log
from tests.processes import LiveRun, write_spec
from tests.s3 import S3Server
from tests.watch import Watch, wait_until
from tests.whole_jobs import job_of, write_shapes

COMMIT_INTERVAL_S = 1.0
BATCH_SIZE = 4
QUESTIONS = 2


@dataclass(frozen=True)
class Scene:
    """A job with what belongs to it, in a folder of its own."""

    folder: Path
    job: JobSpec
    answers: int

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def run(self, **orders: Any) -> LiveRun:
        return LiveRun(self.spec(), Orders(str(self.log), **orders))

    def spec(self) -> Path:
        return write_spec(self.job, self.folder / "job.json")

    def watch(self) -> Watch:
        return Watch(fsspec.filesystem("file"), self.job.output.path)

    def faults(self) -> list[str]:
        """What verify finds, after the last run."""
        report = verify(self.job)
        is_whole = report.ok and report.counts["ok"] == report.inputs == self.answers
        return [] if is_whole else [f"verify: {report.to_json()}"]

    def moved(self, place: str, server: S3Server, *, endpoint_url: str) -> "Scene":
        """The same job with source and output on the server."""
        fs = s3_of(server)
        fs.put(str(self.folder / "in"), f"{place}/in", recursive=True)
        storage = StorageSpec(endpoint_url=endpoint_url)
        source = {"path": f"{place}/in/", "storage": storage}
        output = {"path": f"{place}/out", "storage": storage}
        update = {
            "source": self.job.source.model_copy(update=source),
            "output": self.job.output.model_copy(update=output),
        }
        return replace(self, job=self.job.model_copy(update=update))


def scene(folder: Path, *, shards: int, images: int, **output: Any) -> Scene:
    """A job over `shards` of `images` each, which are asked two questions."""
    write_shapes(folder / "in", shards=shards, images=images)
    out = {"path": str(folder / "out"), "commit_interval_s": COMMIT_INTERVAL_S, **output}
    resources = {"generate": {"actors": 1, "batch_size": BATCH_SIZE}}
    job = job_of(folder / "in", folder / "out", output=out, resources=resources)
    return Scene(folder, job, answers=shards * images * QUESTIONS)


def s3_of(server: S3Server) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("s3", endpoint_url=server.endpoint_url, use_listings_cache=False)


def place_on(server: S3Server, folder: Path) -> str:
    return server.url(f"{folder.parent.name}/{folder.name}")


def wait_for_answers(run: LiveRun, log: Path) -> None:
    def is_answering() -> bool:
        lines = [line for line in read_log(log) if line.event != "opened"]
        return bool(lines) and lines[-1].at > run.started_at

    wait_until(lambda: run.process.poll() is not None or is_answering(), timeout_s=120)
