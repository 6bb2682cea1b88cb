"""The demo: the main job on the images that come with the package, and what it answered.

Nothing here is special to the demo but the spec: it runs as every other job does.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow.dataset as ds

from jobs.load import build_spec
from jobs.quick import CAPTION_PROMPT
from pipeline.embedded import SAMPLES
from pipeline.parts import ANSWERS, SUFFIX
from pipeline.storage import Output
from schemas.job import EMBEDDED, JobSpec

IMAGES_SHOWN = 6


def demo_spec(output: str) -> JobSpec:
    """A caption of each sample, and an answer to each of its questions."""
    return build_spec(
        {
            "name": "demo",
            "source": {
                "format": "webdataset",
                "path": str(SAMPLES),
                "keep": ["colour", "shape"],
            },
            "ask": [{"id": "caption", "prompt": CAPTION_PROMPT}, {"from": "questions"}],
            "model": {"path": EMBEDDED},
            "output": {"path": output},
        },
        origin="demo",
    )


def showcase(job: JobSpec) -> str:
    """A few images of the answer table, each as it was drawn and as the model sees it."""
    output = Output(job.output.path, job.output.storage)
    parts = [f"{output.root}/{name}" for name in output.names(ANSWERS, suffix=SUFFIX)]
    table = ds.dataset(parts, filesystem=output.fs, format="parquet").to_table()
    rows = table.sort_by([("source_uri", "ascending"), ("source_index", "ascending")]).to_pylist()
    images = [list(group) for _, group in groupby(rows, key=_place)]
    # Evenly spread, so that not every image shown is from the first shard.
    shown = images[:: max(1, len(images) // IMAGES_SHOWN)][:IMAGES_SHOWN]
    lines = ["", "A few of the answers, beside what the image was drawn as:"]
    for image in shown:
        lines += _lines(image)
    return "".join(f"{line}\n" for line in lines)


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["source_uri"], row["source_index"]


def _lines(image: list[dict[str, Any]]) -> Iterator[str]:
    first = image[0]
    # Kept columns of an untyped source are JSON text.
    drawn = " ".join(str(first[name]).strip('"') for name in ("colour", "shape"))
    yield f"\n  {first['sample_id']}: a {drawn}"
    for row in image:
        yield f"    {row['question']:<42} {row['answer'] or row['error_message']}"
