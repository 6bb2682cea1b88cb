"""Whole jobs whose memory is watched: very many tiny images, and a few very large ones."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.preprocess import photo
from schemas.job import JobSpec
from tests.memory import KINDS, MOST_GROWTH, Record, figures_by_kind, recorded
from tests.processes import LiveRun, write_spec
from tests.shards import saved, write_shard
from tests.whole_jobs import answers, job_of, scene

Figures = dict[str, Any]

SCENES = 24
BYTES_IN_FLIGHT = 128 * 2**20
MACHINE_BYTES = 4 * 2**30
STORE_FRACTION = 0.3
"""Of a machine's memory, Ray's object store by default."""
TILE, TILES = (3000, 2100), (4, 4)
QUESTION = {"id": "shape", "prompt": "what shape is present?"}


def tiny_images(folder: Path, *, shards: int, images: int) -> Figures:
    """What each kind of process takes in each tenth of the answers; the last may not be more.

    Files of answers are small, so that folding, which takes them into memory, begins early.
    """
    drawn = [scene(number)[2] for number in range(SCENES)]
    for shard in range(shards):
        members = [(f"{n:04}.png", drawn[n % SCENES]) for n in range(images)]
        write_shard(folder / "in" / f"{shard:03}.tar", members)
    total = shards * images
    job = watched_job(folder, batch_size=128, rows_per_file=max(total // 20, 1))
    record, faults = watched(job, folder, every_s=1.0, timeout_s=3600)
    found = figures_by_kind(record, total)
    for kind in KINDS:
        growth = found[kind]["rss_growth"]
        if not 0 < growth <= MOST_GROWTH:
            faults.append(f"{kind}: the last tenth takes {growth} times the second")
    return {"images": total, "mb_by_tenths": found, **counted(folder, total, faults)}


def gigapixels(folder: Path, *, shards: int) -> Figures:
    """Images of 100 megapixels, on what Ray believes to be a machine of 4 GB."""
    large = [(kind, hundred_megapixels(kind)) for kind in ("jpg", "rgb.png", "rgba.png")]
    kinds = [large[0]] * 12 + [large[1]] * 2 + [large[2]] * 2
    for shard in range(shards):
        members = [(f"{n:02}.{kind.split('.')[-1]}", data) for n, (kind, data) in enumerate(kinds)]
        write_shard(folder / "in" / f"{shard}.tar", members)
    total = shards * len(kinds)
    job = watched_job(folder, stage_cpus=0.75)
    with machine_of(MACHINE_BYTES):
        record, faults = watched(job, folder, every_s=0.3, timeout_s=1800)
    peak = record.peak
    if peak.pss * 2**20 > MACHINE_BYTES:
        faults.append(f"{peak.pss:.0f} MB were taken at once")
    return {
        "images": total,
        "image_mb": {kind: round(len(data) / 2**20) for kind, data in large},
        "peak_pss_mb": round(peak.pss),
        "of_that": {kind: round(peak.pss_of(kind)) for kind in peak.kinds},
        **counted(folder, total, faults),
    }


def watched_job(
    folder: Path, *, batch_size: int = 16, stage_cpus: float | None = None, **output: Any
) -> JobSpec:
    """`stage_cpus`: of an actor; 0.75 leave two cores room for one task that reads, not two."""
    return job_of(
        folder / "in",
        folder / "out",
        ask=[QUESTION],
        generate={"max_new_tokens": 4},
        output={"path": str(folder / "out"), "commit_interval_s": 5, **output},
        resources={
            "preprocess": {"cpus": stage_cpus},
            "generate": {"batch_size": batch_size, "cpus": stage_cpus},
            "bytes_in_flight": BYTES_IN_FLIGHT,
        },
    )


def watched(
    job: JobSpec, folder: Path, *, every_s: float, timeout_s: float
) -> tuple[Record, list[str]]:
    spec = write_spec(job, folder / "job.json")
    with LiveRun(spec) as run, recorded(run, every_s=every_s) as record:
        status, said = run.wait(timeout_s)
    return record, [said] if status else []


def counted(folder: Path, total: int, faults: list[str]) -> Figures:
    ok = sum(row["status"] == "ok" for row in answers(folder / "out"))
    return {"ok": ok, "faults": faults if ok == total else [*faults, f"{ok} of {total} are ok"]}


@contextmanager
def machine_of(n_bytes: int) -> Iterator[None]:
    """Ray's object store is as large as it would be on a machine of so much memory."""
    name = "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ[name] = str(STORE_FRACTION * min(n_bytes / there, 1.0))
    try:
        yield
    finally:
        del os.environ[name]


def hundred_megapixels(kind: str) -> bytes:
    """12,000 x 8,400 pixels of a photo that is repeated; PNGs of few colours, to be no larger."""
    with Image.open(io.BytesIO(photo(TILE, seed=1))) as tile:
        pixels = np.tile(np.asarray(tile), (*TILES, 1))
    if kind == "jpg":
        return saved(Image.fromarray(pixels), "JPEG", quality=90)
    pixels &= 0xE0
    if kind == "rgba.png":
        pixels = np.dstack([pixels, pixels[..., :1]])
    return saved(Image.fromarray(pixels), "PNG", compress_level=1)
