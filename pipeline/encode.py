"""The CPU step: images become uint8 pixels, a row's lines tokenised prompts, or failed ones.

One row in, one row out. What goes wrong with an image or a question is written into its PROMPT
entries and travels on; nothing raised here is about a single row. While the images of a batch are
decoded in a process beside this one (`decoder.py`), its prompts are rendered here, and tokenised
where the size of the image does not matter. Knows no ray and no weights.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from pipeline.decoder import Decoded, Decoder
from pipeline.engine.load import load_processor
from pipeline.entries import Entries, Entry, fail, ready, waiting
from pipeline.prompt import SEVERAL_IMAGES
from pipeline.reading import Reader
from pipeline.script import scripts_of
from pipeline.sources.base import Turn
from pipeline.tokenise import Reading, Tokeniser
from schemas.errors import DecodeError, PromptError, about_image
from schemas.job import JobSpec
from schemas.tables import KEEP, LINE, PREPARED, SAMPLE, SHARD, error_of, table_of, with_keep

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_BUT_IMAGES = [name for name in SAMPLE.names if name not in {"image", "more_images"}]
_FOR_LATER = ("conversation", "columns")

Line = dict[str, Any]
"""A SAMPLE_LINE struct, or a PREPARED_LINE struct in the making."""
_Images = Sequence[pa.Buffer | None]
_Begun = tuple[dict[str, Any], "list[Future[Decoded]]"]
"""A PREPARED row in the making, and its images where they are being decoded."""
_log = logging.getLogger(__name__)


class Encode:
    """SAMPLE rows (plus kept columns) to PREPARED rows, in their order; end marks pass."""

    def __init__(self, job: JobSpec, keep: Mapping[str, pa.DataType]) -> None:
        self._keep = keep
        processor = load_processor(job.model)
        self._tokeniser = Tokeniser(job.model, processor)
        self._reader = Reader(job, processor, self._tokeniser)
        self._decoder = Decoder(self._reader.settings)
        self._scripts = scripts_of(job)
        self._entries = Entries(job, self._scripts)
        # Else the driver does, or there is nothing to warn of.
        self._warns = len(job.source.columns.images) <= 1 and not self._reader.may_see_several

    def __call__(self, batch: pa.Table) -> pa.Table:
        samples = batch.select(_BUT_IMAGES).to_pylist()
        images = _images_in(batch)
        begun = [self._begun(*row) for row in zip(samples, images, strict=True)]
        rows = [self._ended(*row) for row in zip(begun, samples, images, strict=True)]
        table = table_of(rows, PREPARED)
        for name in self._keep:
            table = table.append_column(KEEP + name, batch.column(KEEP + name))
        return table.cast(with_keep(PREPARED, self._keep))

    def _begun(self, sample: dict[str, Any], images: _Images) -> _Begun:
        """The row as far as it can be without pixels, which are on their way if it needs any."""
        row = {name: sample[name] for name in _SHARD}
        if sample["lines"] is None:
            return row, []
        row["lines"] = [self._line(line, uri=row["source_uri"]) for line in sample["lines"]]
        if not any(ready(line["prompts"]) for line in row["lines"]):
            return row, []
        if len(images) > 1 and self._warns:
            self._warns = False
            _log.warning("%s: its rows bring several images: %s", row["source_uri"], SEVERAL_IMAGES)
        decoder = self._decoder if len(images) == 1 else self._decoder_of_several
        return row, [decoder.submit(memoryview(image or b"")) for image in images]

    @functools.cached_property
    def _decoder_of_several(self) -> Decoder:
        """Another one only where each of several is resized in another way than one alone."""
        settings = self._reader.settings_of_several
        return self._decoder if settings == self._reader.settings else Decoder(settings)

    def _line(self, line: Line, *, uri: str) -> Line:
        """The line as far as it can be without pixels."""
        entries = self._entries.of(line, uri)
        prepared = {**{name: line[name] for name in _LINE}, "prompts": entries}
        if any(entry["is_later"] for entry in waiting(entries)):
            prepared |= {name: line[name] for name in _FOR_LATER}
        return prepared

    def _ended(self, begun: _Begun, sample: dict[str, Any], images: _Images) -> dict[str, Any]:
        row, decoding = begun
        columns = [_known(image) for image in images]
        if decoding:
            asked = []
            for line, prepared in zip(sample["lines"], row["lines"], strict=True):
                entries = ready(prepared["prompts"])
                self._render(entries, line, images=len(images))
                asked += entries
            reading = self._reader.always(len(images))
            if reading is not None:
                self._tokenise(asked, reading)
            try:
                self._reader.check(len(images))
                found = self._looked_at(_results(decoding), asked, reading)
                columns = [known | each for known, each in zip(columns, found, strict=True)]
            except (DecodeError, PromptError) as error:
                for entry in asked:
                    entry.update(prompt=None, token_ids=None)
                    fail(entry, error_of(error))
        first, *more = columns
        return {**row, **first, "more_images": more or None}

    def _looked_at(
        self, images: Sequence[Decoded], asked: list[Entry], reading: Reading | None
    ) -> list[dict[str, Any]]:
        """What there is to be said of images, once they are there."""
        columns: list[dict[str, Any]]
        columns = [{"image_width": i.width, "image_height": i.height} for i in images]
        if reading is None:
            self._tokenise(asked, self._reader.of(images))
        if waiting(asked):
            for image, each in zip(images, columns, strict=True):
                each |= self._reader.pixels(image)
        return columns

    def _render(self, entries: list[Entry], line: Line, *, images: int) -> None:
        """Fill in the prompts as text; those that cannot be asked fail."""
        earlier = tuple(Turn(t["role"], t["content"]) for t in line["conversation"] or ())
        for entry in entries:
            try:
                shots = self._scripts[entry["unit"]].shots
                entry["prompt"] = self._tokeniser.render(entry["question"], earlier, shots, images)
            except PromptError as error:
                fail(entry, error_of(error))

    def _tokenise(self, entries: list[Entry], reading: Reading) -> None:
        """Fill in the ids of what is rendered."""
        for entry in waiting(entries):
            reading.fill_in(entry, options=self._scripts[entry["unit"]].ask.options)


def _images_in(batch: pa.Table) -> Sequence[_Images]:
    """The images of each row, one at least. The bytes stay where Arrow has them."""
    images = [[image.as_buffer()] for image in batch["image"]]
    if batch["more_images"].null_count < len(images):
        for several, more in zip(images, batch["more_images"], strict=True):
            several += [image.as_buffer() for image in more.values or ()]
    return images


def _known(image: pa.Buffer | None) -> dict[str, str]:
    return {} if image is None else {"image_sha256": hashlib.sha256(image).hexdigest()}


def _results(decoding: Sequence["Future[Decoded]"]) -> list[Decoded]:
    """Raises DecodeError, which says which of several images it is."""
    found = []
    for number, future in enumerate(decoding, 1):
        try:
            found.append(future.result())
        except DecodeError as error:
            raise about_image(error, number=number, count=len(decoding)) from error
    return found
