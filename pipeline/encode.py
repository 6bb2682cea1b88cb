"""The CPU step: an image becomes uint8 pixels, its lines tokenised prompts, or failed ones.

One row in, one row out. What goes wrong with an image or a question is written into its PROMPT
entries and travels on; nothing raised here is about a single row. While the images of a batch are
decoded in a process beside this one (`decoder.py`), its prompts are rendered here, and tokenised
where the size of the image does not matter. Knows no ray and no weights.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from pipeline.decoder import Decoded, Decoder
from pipeline.engine.load import load_processor
from pipeline.entries import Entries, Entry, fail, ready, waiting
from pipeline.reading import Reader
from pipeline.script import scripts_of
from pipeline.sources.base import Turn
from pipeline.tokenise import Reading, Tokeniser
from schemas.errors import DecodeError, PromptError
from schemas.job import JobSpec
from schemas.tables import KEEP, LINE, PREPARED, SAMPLE, SHARD, error_of, table_of, with_keep

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_BUT_IMAGE = [name for name in SAMPLE.names if name != "image"]
_FOR_LATER = ("conversation", "columns")

Line = dict[str, Any]
"""A SAMPLE_LINE struct, or a PREPARED_LINE struct in the making."""
_Begun = tuple[dict[str, Any], "Future[Decoded] | None"]
"""A PREPARED row in the making, and its image where that is being decoded."""


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

    def __call__(self, batch: pa.Table) -> pa.Table:
        samples = batch.select(_BUT_IMAGE).to_pylist()
        # Not as a part of the rows: the bytes stay where Arrow has them.
        images = [image.as_buffer() for image in batch["image"]]
        begun = [self._begun(*row) for row in zip(samples, images, strict=True)]
        rows = [self._ended(*row) for row in zip(begun, samples, images, strict=True)]
        table = table_of(rows, PREPARED)
        for name in self._keep:
            table = table.append_column(KEEP + name, batch.column(KEEP + name))
        return table.cast(with_keep(PREPARED, self._keep))

    def _begun(self, sample: dict[str, Any], image: pa.Buffer | None) -> _Begun:
        """The row as far as it can be without pixels, which are on their way if it needs any."""
        row = {name: sample[name] for name in _SHARD}
        if sample["lines"] is None:
            return row, None
        row["lines"] = [self._line(line, uri=row["source_uri"]) for line in sample["lines"]]
        if not any(ready(line["prompts"]) for line in row["lines"]):
            return row, None
        return row, self._decoder.submit(memoryview(b"" if image is None else image))

    def _line(self, line: Line, *, uri: str) -> Line:
        """The line as far as it can be without pixels."""
        entries = self._entries.of(line, uri)
        prepared = {**{name: line[name] for name in _LINE}, "prompts": entries}
        if any(entry["is_later"] for entry in waiting(entries)):
            prepared |= {name: line[name] for name in _FOR_LATER}
        return prepared

    def _ended(
        self, begun: _Begun, sample: dict[str, Any], image: pa.Buffer | None
    ) -> dict[str, Any]:
        row, decoding = begun
        if image is not None:
            row["image_sha256"] = hashlib.sha256(image).hexdigest()
        if decoding is not None:
            asked = []
            for line, prepared in zip(sample["lines"], row["lines"], strict=True):
                entries = ready(prepared["prompts"])
                self._render(entries, line)
                asked += entries
            if self._reader.always is not None:
                self._tokenise(asked, self._reader.always)
            try:
                row |= self._looked_at(decoding.result(), asked)
            except (DecodeError, PromptError) as error:
                for entry in asked:
                    entry.update(prompt=None, token_ids=None)
                    fail(entry, error_of(error))
        return row

    def _looked_at(self, image: Decoded, asked: list[Entry]) -> dict[str, Any]:
        """What there is to be said of an image, once it is there."""
        columns: dict[str, Any] = {"image_width": image.width, "image_height": image.height}
        if self._reader.always is None:
            self._tokenise(asked, self._reader.of(image))
        if waiting(asked):
            columns |= self._reader.pixels(image)
        return columns

    def _render(self, entries: list[Entry], line: Line) -> None:
        """Fill in the prompts as text; those that cannot be asked fail."""
        earlier = tuple(Turn(t["role"], t["content"]) for t in line["conversation"] or ())
        for entry in entries:
            try:
                shots = self._scripts[entry["unit"]].shots
                entry["prompt"] = self._tokeniser.render(entry["question"], earlier, shots)
            except PromptError as error:
                fail(entry, error_of(error))

    def _tokenise(self, entries: list[Entry], reading: Reading) -> None:
        """Fill in the ids of what is rendered."""
        for entry in waiting(entries):
            reading.fill_in(entry, options=self._scripts[entry["unit"]].ask.options)
