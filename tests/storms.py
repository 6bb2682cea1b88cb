"""Whole jobs over S3 whose connections misbehave at random for as long as they run.

Each kind of source is answered once in calm and once through the storm; the tables have to be the
same. A run that gives up is followed by another, as a person would do it.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from jobs.verify import verify
from schemas.errors import LavaflowError
from schemas.job import JobSpec, StorageSpec
from tests.formats import KINDS, asks_of, source_of, write_sources
from tests.proxy import Faults, Proxy
from tests.s3 import S3Server
from tests.scenes import place_on, s3_of
from tests.whole_jobs import job_of, ray_of, run, scene

MOST_PADDING = 200_000
IMAGES_PER_SHARD = 20
BETWEEN_SILENCES_S = (5.0, 20.0)
MOST_RUNS = 10
PAUSE_S = 5.0
"""Between runs, as long as a person takes to start the next."""
OF_THE_RUN = ("run_id", "answered_at", "attempts")
"""Columns that tell of the run, not of the answer."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Storm:
    """How bad it is: the share of requests that are hit, and how soon silence counts as loss.

    `silence_s`: now and then, for so long, nobody is answered at all.
    """

    share: float
    timeout_s: float
    silence_s: float = 0.0
    seed: int = 0


def storms(
    folder: Path,
    server: S3Server,
    *,
    images: int,
    storm: Storm,
    kinds: Sequence[str] = KINDS,
) -> Figures:
    """Jobs over the same images in each kind of source; both sides of a job are in the storm."""
    rng = random.Random(storm.seed)
    # Decoders pass over what follows the end of a PNG; answers take their time to come.
    drawn = [scene(n)[2] + rng.randbytes(rng.randrange(MOST_PADDING)) for n in range(images)]
    write_sources(folder / "in", drawn, shards=max(3, images // IMAGES_PER_SHARD))
    place = place_on(server, folder)
    s3_of(server).put(str(folder / "in"), f"{place}/in", recursive=True)
    figures: Figures = {"images": images, "share": storm.share, "jobs": {}, "faults": []}
    with ray_of(num_cpus=2):
        for kind in kinds:
            found = _compared(kind, place, server, storm)
            figures["faults"] += found.pop("faults")
            figures["jobs"][kind] = found
    return figures


def _compared(kind: str, place: str, server: S3Server, storm: Storm) -> Figures:
    calm = _job(kind, place, "calm", StorageSpec(endpoint_url=server.endpoint_url))
    run(calm)
    proxy = Proxy(server.port)
    with closing(proxy):
        storage = StorageSpec(endpoint_url=proxy.endpoint_url, timeout_s=storm.timeout_s)
        stormy = _job(kind, place, "stormy", storage)
        start = time.monotonic()
        with _raging(proxy, storm) as happened:
            ends = _run_to_the_end(stormy)
        elapsed_s = time.monotonic() - start
        report = verify(stormy)
    expected, rows = _rows(calm, server), _rows(stormy, server)
    faults = [] if report.ok else [f"{kind}: verify: {report.to_json()}"]
    faults += [f"{kind}: {text}" for text in _differences(expected, rows)]
    return {
        "rows": len(rows),
        "ok": sum(row["status"] == "ok" for row in rows.values()),
        "failed": sum(row["status"] == "failed" for row in rows.values()),
        "hit": dict(sorted(happened.items())),
        "runs": ends,
        "elapsed_s": round(elapsed_s, 1),
        "faults": faults,
    }


@contextmanager
def _raging(proxy: Proxy, storm: Storm) -> Iterator[Counter[str]]:
    """What has happened so far; all is well again afterwards."""
    faults = Faults(storm.seed, share=storm.share, slow_s=storm.timeout_s)
    silence = Faults(storm.seed, share=1, kinds=("hole",))
    is_over = threading.Event()

    def fall_silent() -> None:
        rng = random.Random(storm.seed)
        while storm.silence_s and not is_over.wait(rng.uniform(*BETWEEN_SILENCES_S)):
            proxy.faults = silence
            faults.happened["silence"] += 1
            is_over.wait(storm.silence_s)
            proxy.faults = faults

    proxy.faults = faults
    thread = threading.Thread(target=fall_silent)
    thread.start()
    try:
        yield faults.happened
    finally:
        is_over.set()
        thread.join()
        proxy.faults = None


def _job(kind: str, place: str, output: str, storage: StorageSpec) -> JobSpec:
    keys = {
        "source": source_of(kind, f"{place}/in", storage=storage),
        "ask": asks_of(kind),
        "output": {"path": f"{place}/{output}-{kind}", "storage": storage, "commit_interval_s": 1},
        "max_failed_fraction": 1.0,
    }
    return job_of("", "", **keys)


def _run_to_the_end(job: JobSpec) -> list[str]:
    """How each run ended, the last one complete or one too many."""
    ends: list[str] = []
    while "complete" not in ends and len(ends) < MOST_RUNS:
        try:
            ends.append(run(job)[0].record["ended"])
        except LavaflowError as error:
            ends.append(f"{type(error).__name__}: {error}")
            time.sleep(PAUSE_S)
    return ends


def _rows(job: JobSpec, server: S3Server) -> Mapping[tuple[Any, ...], Mapping[str, Any]]:
    """What the table says, by place and question."""
    path = f"{job.output.path}/answers".removeprefix("s3://")
    rows = ds.dataset(path, format="parquet", filesystem=s3_of(server)).to_table().to_pylist()
    return {
        (row["source_uri"], row["source_index"], row["question_id"] or ""): {
            # A sum in another order, where another batch was answered.
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in row.items()
            if name not in OF_THE_RUN
        }
        for row in rows
    }


def _differences(
    expected: Mapping[tuple[Any, ...], Any], rows: Mapping[tuple[Any, ...], Any]
) -> Iterable[str]:
    wrong = [key for key in {*expected, *rows} if expected.get(key) != rows.get(key)]
    if wrong:
        first = min(wrong)
        yield f"{len(wrong)} rows differ; {first}: {expected.get(first)}, not {rows.get(first)}"
