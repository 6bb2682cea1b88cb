"""Whole jobs for the tests: shards of coloured shapes, a Ray of any size, the command line."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from rich.console import Console

from jobs.load import dump_spec
from jobs.run import RunResult, run_job
from schemas.job import JobSpec
from tests.shards import json_bytes, saved, write_shard
from tools.shapes import COLOURS, SHAPES, Scene, draw


@dataclass(frozen=True)
class Finished:
    """A job that is complete: what is in its images, its record, and what it said on the way."""

    job: JobSpec
    drawn: Sequence[tuple[str, str]]
    record: Mapping[str, Any]
    said: str

    def copy(self, folder: Path) -> JobSpec:
        """The job over the same source, with its own copy of the output."""
        shutil.copytree(self.job.output.path, folder / "out")
        output = self.job.output.model_copy(update={"path": str(folder / "out")})
        return self.job.model_copy(update={"output": output})


REPOSITORY = Path(__file__).parents[1]


def scene(number: int) -> tuple[str, str, bytes]:
    """The colour, the shape and the PNG of the `number`th of 24 scenes, large and in the middle."""
    colour = tuple(COLOURS)[number % len(COLOURS)]
    shape = SHAPES[number % len(SHAPES)]
    height = {"circle": 26, "rectangle": 20, "triangle": 22.5}[shape]
    box = (20, 18, 26, height)
    drawn = draw(Scene(shape, colour, box=box, background=(240, 240, 250)))
    return colour, shape, saved(drawn, "PNG")


def write_shapes(folder: Path, *, shards: int, images: int) -> list[tuple[str, str]]:
    """Tar shards of shapes that bring the question for their colour; the (colour, shape) of all."""
    drawn = []
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for index in range(images):
            colour, shape, image = scene(shard * images + index)
            drawn.append((colour, shape))
            questions = [{"id": "colour", "question": "what color is the shape?"}]
            members += [(f"{index:03}.png", image)]
            members += [(f"{index:03}.json", json_bytes({"questions": questions}))]
        write_shard(folder / f"shapes-{shard:03}.tar", members)
    return drawn


def job_of(source: str | Path, output: str | Path, /, **keys: Any) -> JobSpec:
    """What shape is there, and the rows' own questions, of tar shards; `keys` replace keys."""
    spec: dict[str, Any] = {
        "source": {"format": "webdataset", "path": str(source)},
        "ask": [{"id": "shape", "prompt": "what shape is present?"}, {"from": "questions"}],
        "output": {"path": str(output)},
        "resources": {"generate": {"batch_size": 4}},
        **keys,
    }
    return JobSpec.model_validate(spec)


def run(job: JobSpec) -> tuple[RunResult, str]:
    """Run in this process; also what it said on the way."""
    said = io.StringIO()
    result = run_job(job, address=None, console=Console(file=said, width=200))
    return result, said.getvalue()


def finish(folder: Path) -> Finished:
    """Answer two questions about each of 24 images, by the installed command."""
    drawn = write_shapes(folder / "in", shards=2, images=12)
    output = {"path": str(folder / "out"), "rows_per_file": 20}
    job = job_of(folder / "in", folder / "out", output=output)
    (folder / "job.yaml").write_text(dump_spec(job))
    done = lavaflow("run", str(folder / "job.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    return Finished(job, drawn, json.loads(done.stdout), done.stderr)


def lavaflow(
    *args: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The installed command, as a person runs it."""
    command = [str(Path(sys.executable).with_name("lavaflow")), *args]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def answers(output: str | Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of the table, by place and question."""
    table = ds.dataset(f"{output}/answers", format="parquet", **options).to_table()
    return sorted(
        table.to_pylist(),
        key=lambda row: (row["source_uri"], row["source_index"], row["question_id"] or ""),
    )


@contextlib.contextmanager
def ray_of(*, num_cpus: int, num_gpus: int = 0) -> Iterator[None]:
    """A Ray session that believes it has this much; jobs in this process use it."""
    import ray

    with contextlib.chdir(REPOSITORY):
        ray.init(
            "local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()
