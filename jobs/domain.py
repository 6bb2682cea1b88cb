"""Warns whoever asks the embedded model about images that it does not know.

Looks at the first image of a few shards, through the same reading and decoding as the job itself.
"""

import contextlib
from collections.abc import Sequence

from PIL import Image

from pipeline.coverage import Ranges
from pipeline.decoder import Decoder, settings_of
from pipeline.embedded.domain import SIDE_PX, is_coloured_shape
from pipeline.engine.pixels import Resize
from pipeline.read import ShardWork
from pipeline.sources import open_source
from schemas.errors import DecodeError, SpecError, StoreUnavailable
from schemas.job import EMBEDDED, JobSpec

SHARDS_LOOKED_AT = 8
SMALL = Resize(
    margin=None,
    edge=None,
    fixed=(SIDE_PX, SIDE_PX),
    resample=Image.Resampling.BOX,
    crop=None,
)

WARNING = """\
WARNING: the embedded model knows one coloured shape on a light background, and nothing else.
{uri}, row {index} is no such image: its answers, and those about images like it, will be
WRONG, however sure they sound. Name a model that knows your images with --model or model.path,
such as llava-hf/llava-1.5-7b-hf."""


def warning_of(job: JobSpec, work: Sequence[ShardWork]) -> str | None:
    """The warning for the first image found that the embedded model does not know, if any."""
    if job.model.path != EMBEDDED:
        return None
    source = open_source(job.source)
    step = max(1, len(work) // SHARDS_LOOKED_AT)
    with Decoder(settings_of(job, SMALL)) as decoder:
        for item in work[::step][:SHARDS_LOOKED_AT]:
            try:
                with contextlib.closing(source.read(item.shard, skip=Ranges())) as samples:
                    sample = next(samples, None)
            except (StoreUnavailable, SpecError):
                # The run itself is more patient with the store than a warning is worth.
                return None
            if sample is None or sample.image is None:
                continue
            try:
                image = decoder.submit(sample.image).result()
            except DecodeError:
                continue
            if not is_coloured_shape(Image.fromarray(image.array)):
                return WARNING.format(uri=item.shard.uri, index=sample.index)
    return None
