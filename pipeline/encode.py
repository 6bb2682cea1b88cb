"""The CPU step: an image becomes uint8 pixels, its lines tokenised prompts, or failed ones.

One row in, one row out. What goes wrong with an image or a question is written into its PROMPT
entries and travels on; nothing raised here is about a single row. While the images of a batch are
decoded in a process beside this one (`decoder.py`), its prompts are rendered here, and tokenised
where the size of the image does not matter. Knows no ray and no weights.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from pipeline.decode_process import DecodeSettings
from pipeline.decoder import Decoded, Decoder, settings_of
from pipeline.engine.load import load_processor
from pipeline.engine.pixels import ProcessorResize, pixel_table, resize_of
from pipeline.sources.base import Turn
from pipeline.tokenise import Tokeniser
from schemas.ask import AskPrompt
from schemas.errors import (
    DecodeError,
    PromptError,
    QuestionsMalformed,
    RowError,
    SpecError,
)
from schemas.job import JobSpec
from schemas.tables import (
    KEEP,
    LINE,
    PREPARED,
    PROMPT,
    SAMPLE,
    SHARD,
    error_of,
    table_of,
    with_keep,
)

_SHARD, _LINE = [field.name for field in SHARD], [field.name for field in LINE]
_BUT_IMAGE = [name for name in SAMPLE.names if name != "image"]
_NO_QUESTIONS = {
    "stage": "prompt",
    "class": "NoQuestions",
    "message": "the row brings no questions of its own: there is nothing to answer",
}
"""Why a row is skipped; no RowError, since nothing is wrong with it."""

_NOTHING = dict.fromkeys(field.name for field in PROMPT)

Entry = dict[str, Any]
"""One PROMPT struct in the making."""
Line = dict[str, Any]
"""A SAMPLE_LINE struct, or a PREPARED_LINE struct in the making."""
_Begun = tuple[dict[str, Any], "Future[Decoded] | None"]
"""A PREPARED row in the making, and its image where that is being decoded."""


class Encode:
    """SAMPLE rows (plus kept columns) to PREPARED rows, in their order; end marks pass."""

    def __init__(self, job: JobSpec, keep: Mapping[str, pa.DataType]) -> None:
        self._keep = keep
        processor = load_processor(job.model)
        pixel_table(processor)
        self._decoder = Decoder(_decode_settings(job, processor))
        self._tokeniser = Tokeniser(job.model, processor)
        self._asks = dict(zip(job.units, job.ask, strict=True))
        self._longest = {u: job.decoding(ask).max_new_tokens for u, ask in self._asks.items()}

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
        row["lines"] = [self._asked_line(line) for line in sample["lines"]]
        if not any(_waiting(line["prompts"]) for line in row["lines"]):
            return row, None
        return row, self._decoder.submit(memoryview(b"" if image is None else image))

    def _ended(
        self, begun: _Begun, sample: dict[str, Any], image: pa.Buffer | None
    ) -> dict[str, Any]:
        row, decoding = begun
        if image is not None:
            row["image_sha256"] = hashlib.sha256(image).hexdigest()
        if decoding is not None:
            waiting = []
            for line, prepared in zip(sample["lines"], row["lines"], strict=True):
                entries = _waiting(prepared["prompts"])
                self._render(entries, line)
                waiting += entries
            if (places := self._tokeniser.image_tokens.fixed) is not None:
                self._tokenise(waiting, places)
            try:
                decoded = decoding.result()
            except DecodeError as error:
                for entry in waiting:
                    entry.update(prompt=None, token_ids=None)
                    _fail(entry, error_of(error))
                return row
            if places is None:
                size = (decoded.width, decoded.height)
                self._tokenise(waiting, self._tokeniser.image_tokens.of(size))
            row |= _image_columns(decoded, is_wanted=bool(_waiting(waiting)))
        return row

    def _render(self, entries: list[Entry], line: Line) -> None:
        """Fill in the prompts as text; those that cannot be asked fail."""
        earlier = tuple(Turn(t["role"], t["content"]) for t in line["conversation"] or ())
        for entry in entries:
            try:
                entry["prompt"] = self._tokeniser.render(entry["question"], earlier)
            except PromptError as error:
                _fail(entry, error_of(error))

    def _tokenise(self, entries: list[Entry], places: int) -> None:
        """Fill in the ids of what is rendered, so many image tokens among them."""
        for entry in _waiting(entries):
            try:
                ids = self._tokeniser.ids(entry["prompt"], (places,))
                longest = entry["max_new_tokens"]
                if given := self._asks[entry["unit"]].choices:
                    choices = self._tokeniser.choices(entry["prompt"], given, (places,))
                    longest = choices.longest - len(ids)
                    entry["choices"] = dataclasses.asdict(choices)
                self._tokeniser.check(ids, max_new_tokens=longest)
                entry["token_ids"] = ids
            except PromptError as error:
                _fail(entry, error_of(error))

    def _asked_line(self, line: Line) -> Line:
        """The line as far as it can be without pixels."""
        return {**{name: line[name] for name in _LINE}, "prompts": self._asked(line)}

    def _asked(self, line: Line) -> list[Entry]:
        """An entry for each question that the line's wanted units call for; never none."""
        if line["error"]:
            return [_fail(_entry(), line["error"])]
        entries = [entry for unit in line["units"] for entry in self._asked_of(unit, line)]
        if line["skip"]:
            for entry in _waiting(entries):
                entry.update(status="skipped", error=line["skip"])
        if error := line["image_error"] or line["conversation_error"]:
            for entry in _waiting(entries):
                _fail(entry, error)
        return entries

    def _asked_of(self, unit: str, line: Line) -> Iterator[Entry]:
        ask = self._asks[unit]
        if isinstance(ask, AskPrompt):
            yield self._entry(unit, unit, ask.prompt)
        elif line["questions_error"]:
            yield _fail(_entry(), line["questions_error"])
        elif not line["questions"]:
            yield {**_entry(), "status": "skipped", "error": _NO_QUESTIONS}
        elif error := _ids_that_collide(line["questions"], taken=set(self._asks)):
            yield _fail(_entry(), error_of(error))
        else:
            for own in line["questions"]:
                yield self._entry(unit, own["id"], own["question"])

    def _entry(self, unit: str, id: str, question: str) -> Entry:
        longest = self._longest[unit]
        return _entry(unit=unit, question_id=id, question=question, max_new_tokens=longest)


def _entry(**known: str | int) -> Entry:
    return {**_NOTHING, **known}


def _waiting(entries: list[Entry]) -> list[Entry]:
    """Those that the model is still to answer."""
    return [entry for entry in entries if entry["status"] is None]


def _fail(entry: Entry, error: Mapping[str, str] | None) -> Entry:
    entry.update(status="failed", error=error)
    return entry


def _ids_that_collide(questions: list[dict[str, str]], *, taken: set[str]) -> RowError | None:
    """Two answers of one row under one id could not be told apart."""
    seen = set(taken)
    for question in questions:
        if question["id"] in seen:
            return QuestionsMalformed(
                f"the question id {question['id']!r} is used twice, by the row's questions or by "
                "the spec's ask: ids of one row must be distinct"
            )
        seen.add(question["id"])
    return None


def _image_columns(image: Decoded, *, is_wanted: bool) -> dict[str, Any]:
    columns: dict[str, Any] = {"image_width": image.width, "image_height": image.height}
    if is_wanted:
        columns |= {"pixels": image.pixels, "pixels_shape": image.shape}
    return columns


def _decode_settings(job: JobSpec, processor: Any) -> DecodeSettings:
    """Raises SpecError where images of this processor cannot be decoded as the spec wants."""
    resize = resize_of(processor)
    if job.source.decode == "fast" and isinstance(resize, ProcessorResize):
        raise SpecError(
            f"source.decode is fast, but how large {type(processor.image_processor).__name__} "
            "makes an image is not known beforehand; set source.decode to exact"
        )
    return settings_of(job, resize)
