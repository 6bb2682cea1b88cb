"""Where samples come from: one module a format, one seam (`base.py`) towards the rest."""

from collections.abc import Collection, Mapping

import pyarrow as pa

from pipeline.sources.base import Source
from pipeline.sources.fetch import Fetcher
from pipeline.sources.images import Images
from pipeline.sources.manifest import Manifest
from pipeline.sources.parquet import Parquet
from pipeline.sources.webdataset import WebDataset
from schemas.job import SourceSpec


def open_source(
    spec: SourceSpec,
    *,
    keep: Mapping[str, pa.DataType] | None = None,
    fetcher: Fetcher | None = None,
    fields: Collection[str] = (),
) -> Source:
    """The source of a spec; nothing is listed or read yet.

    `keep`: the types of the kept columns, for who was told them by `keep_types`. `fetcher`: where
    images come from that rows only name. `fields`: columns that samples have to bring, besides
    those that `where` looks at. Raises SpecError for settings that the format does not have.
    """
    if spec.format == "parquet":
        return Parquet(spec, keep=keep, fetcher=fetcher, fields=fields)
    if spec.format == "manifest":
        return Manifest(spec, fetcher=fetcher, fields=fields)
    if spec.format == "images":
        return Images(spec, fetcher=fetcher, fields=fields)
    return WebDataset(spec, fields=fields)
