"""Rows of a table to samples: what each column means, and what cannot be understood of it.

Reads nothing and fetches nothing: batches of plain columns in, samples out, with the path of an
image that is elsewhere.
"""

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import pyarrow as pa
import pyarrow.types as pt

from pipeline.sources.base import KEY, Question, Sample, Turn, valid_text
from pipeline.sources.columns import Unfit, fitted, image_columns, is_list
from pipeline.sources.jsonvalues import parsed
from pipeline.sources.questions import parse_conversation, parse_questions
from pipeline.sources.uris import shown
from schemas.errors import (
    ColumnMalformed,
    ConversationMalformed,
    ImageMissing,
    QuestionsMalformed,
    about_image,
)
from schemas.job import SourceSpec

_Image = tuple[bytes | None, str | None]
"""The bytes of an image and its path, as far as they are there."""


class TableRows:
    """The rows of one file. `columns`: those to be read; there is one at least, to see the rows."""

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        *,
        spec: SourceSpec,
        keep: Mapping[str, pa.DataType],
        fields: AbstractSet[str],
    ) -> None:
        self.uri = uri
        self._keep = keep
        self._columns = spec.columns
        self._images, self._no_image = _images_of(schema, spec.columns.images)
        names = (*self._images, KEY, spec.columns.id, spec.columns.questions)
        self._fields = fields
        asked = {*names, spec.columns.conversation, *keep, *self._fields}
        known = [name for name in schema.names if schema.names.count(name) == 1]
        wanted = [name for name in known if name in asked]
        self.columns: Sequence[str] = wanted or known[:1]

    def sample(
        self, batch: pa.RecordBatch, row: int, *, index: int
    ) -> tuple[Sample, Sequence[str | None]]:
        """The sample of a row, and where each image is that is not in the row."""
        subject = f"{self.uri}: row {index}"
        cells = {name: batch.column(name)[row] for name in self.columns}
        (first, path), *more = found = self._found(cells)
        name = _label(cells.get(KEY), default=shown(path) if path else str(index))
        keep, misfit = self._kept(batch, row, name=name, subject=subject)
        error = misfit or self._missing(found, subject=subject)
        sample = Sample(
            index=index,
            sample_id=_label(cells.get(self._columns.id), default=name),
            image=None if error else first,
            more_images=() if error else [image for image, _ in more],
            image_error=error,
            questions=self._questions(cells, subject=subject),
            conversation=self._conversation(cells, subject=subject),
            keep=keep,
            fields={KEY: name} | {n: _plain(cells[n]) for n in self._fields & cells.keys()},
        )
        wanted = found if error is None else ()
        return sample, [path if image is None else None for image, path in wanted]

    def _found(self, cells: Mapping[str, pa.Scalar]) -> list[_Image]:
        """The images of a row, of each column one at least."""
        found = [each for name in self._images for each in _images_in(cells.get(name))]
        return found or [(None, None)]

    def _missing(self, found: Sequence[_Image], *, subject: str) -> ImageMissing | None:
        numbers = (n for n, (image, path) in enumerate(found, 1) if image is None and not path)
        if (number := next(numbers, None)) is None:
            return None
        if not self._images:
            return ImageMissing(f"{subject}: {self._no_image}")
        names = " and ".join(map(repr, self._images))
        told = f"columns {names} hold" if len(self._images) > 1 else f"column {names} holds"
        error = ImageMissing(f"{subject}: {told} no image and no path of one")
        return about_image(error, number=number, count=len(found))

    def _kept(
        self, batch: pa.RecordBatch, row: int, *, name: str, subject: str
    ) -> tuple[dict[str, pa.Scalar | None], ColumnMalformed | None]:
        """The kept values; where one does not fit, it is null and there is an error."""
        kept: dict[str, pa.Scalar | None] = {}
        error = None
        for column, kind in self._keep.items():
            if column in self.columns:
                value = fitted(batch.column(column).slice(row, 1), kind)
            else:
                value = pa.scalar(name) if column == KEY else None
            if isinstance(value, Unfit):
                error = ColumnMalformed(
                    f"{subject}: column {column!r} {value}, its type in the first file; write the "
                    "files with one type, or take the column out of source.keep"
                )
            kept[column] = None if isinstance(value, Unfit) else value
        return kept, error

    def _questions(
        self, cells: Mapping[str, pa.Scalar], *, subject: str
    ) -> Sequence[Question] | QuestionsMalformed | None:
        name = self._columns.questions
        place = f"{subject}: column {name!r}"
        try:
            value = _json_value(cells.get(name))
        except ValueError as error:
            return QuestionsMalformed(f"{place}: cannot be read: {error}")
        return parse_questions([value] if isinstance(value, str) else value, subject=place)

    def _conversation(
        self, cells: Mapping[str, pa.Scalar], *, subject: str
    ) -> Sequence[Turn] | ConversationMalformed | None:
        name = self._columns.conversation or ""
        place = f"{subject}: column {name!r}"
        try:
            value = _json_value(cells.get(name))
        except ValueError as error:
            return ConversationMalformed(f"{place}: cannot be read: {error}")
        return parse_conversation(value, subject=place)


def _images_of(schema: pa.Schema, asked: Sequence[str]) -> tuple[Sequence[str], str]:
    """The columns with the images, or none and why that is."""
    try:
        return image_columns(schema, asked), ""
    except Unfit as error:
        return (), str(error)


def _images_in(cell: pa.Scalar | None) -> list[_Image]:
    """The images of a cell, one at least."""
    if cell is None or not is_list(cell.type):
        return [_image_in(cell)]
    return [_image_in(each) for each in cell.values or ()] or [(None, None)]


def _image_in(cell: pa.Scalar | None) -> _Image:
    if cell is None or not cell.is_valid:
        return None, None
    if pt.is_struct(cell.type):
        names = {field.name for field in cell.type}
        data, path = (cell[name] if name in names else None for name in ("bytes", "path"))
    else:
        data, path = (None, cell) if _is_text(cell) else (cell, None)
    return (data.as_py() if data is not None else None), _text(path) or None


def _plain(cell: pa.Scalar) -> object:
    """A value as Python's; null where Python has none for it."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


def _label(cell: pa.Scalar | None, *, default: str) -> str:
    """A value as a name; the default where there is none."""
    if cell is None or not cell.is_valid:
        return default
    if _is_text(cell):
        return _text(cell)
    try:
        return valid_text(json.dumps(cell.as_py(), default=str, ensure_ascii=False))
    except (ValueError, OverflowError):
        return default


def _json_value(cell: pa.Scalar | None) -> object:
    """A value as JSON would have held it.

    Text that starts like JSON is read as JSON, else it is text. A struct of lists, as `datasets`
    stores a list of structs, becomes a list. Raises ValueError.
    """
    if cell is None or not cell.is_valid:
        return None
    if _is_text(cell):
        text = _text(cell)
        if not text.lstrip().startswith(("[", "{")):
            return text
        return parsed(text)
    value = cell.as_py()
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def _is_text(cell: pa.Scalar) -> bool:
    return bool(pt.is_string(cell.type) or pt.is_large_string(cell.type))


def _text(cell: pa.Scalar | None) -> str:
    """Text with U+FFFD for what is no UTF-8, which Parquet does not rule out."""
    if cell is None or not cell.is_valid or not _is_text(cell):
        return ""
    data: bytes = cell.as_buffer().to_pybytes()
    return data.decode("utf-8", "replace")
