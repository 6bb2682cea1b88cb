"""Where samples come from: one module a format, one seam (`base.py`) towards the rest."""

from pipeline.sources.base import Source
from pipeline.sources.images import Images
from pipeline.sources.webdataset import WebDataset
from schemas.job import SourceSpec


def open_source(spec: SourceSpec) -> Source:
    """The source of a spec; nothing is listed or read yet.

    Raises SpecError for settings that the format does not have.
    """
    return Images(spec) if spec.format == "images" else WebDataset(spec)
