"""The first step: shards to tables of images with their lines, the end of each shard marked.

Knows what is still to be answered of each shard, but neither formats (`sources/`) nor ray.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.coverage import ShardCoverage
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard, Source
from pipeline.where import parse_where
from schemas.errors import FilterFailed, RowError, StoreUnavailable
from schemas.job import JobSpec
from schemas.tables import KEEP, SAMPLE, error_of, table_of, with_keep

MAX_TABLE_BYTES = 16 * 2**20
MAX_TABLE_LINES = 1024
MOST_LINES = 128
"""Of one row; an image with more has several rows."""
FIELDS = "fields"
"""What `source.where` looks at; stays here."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ShardWork:
    """A shard that is not complete, and what is answered of it already."""

    shard: Shard
    done: ShardCoverage


def read_shards(
    job: JobSpec, work: Sequence[ShardWork], *, keep: Mapping[str, pa.DataType]
) -> Iterator[pa.Table]:
    """Tables of SAMPLE rows (plus kept columns), each of bounded size.

    Rows that have all their answers are left out; each shard's end is marked.
    """
    schema = with_keep(SAMPLE, keep)
    source = open_source(job.source, keep=keep)
    rows: list[Row] = []
    n_bytes = n_lines = 0
    for item in work:
        for row in _rows(job, item, source=source, keep=keep):
            rows.append(row)
            n_bytes += len(row.get("image") or b"")
            n_lines += len(row.get("lines", ()))
            if n_bytes >= MAX_TABLE_BYTES or n_lines >= MAX_TABLE_LINES:
                yield table_of(_filtered(rows, job.source.where), schema)
                rows, n_bytes, n_lines = [], 0, 0
    if rows:
        yield table_of(_filtered(rows, job.source.where), schema)


def _filtered(rows: list[Row], condition: str | None) -> list[Row]:
    """The rows, without FIELDS; an image that no line needs any more is left out."""
    where = parse_where(condition) if condition else None
    lines = [line for row in rows for line in row.get("lines", ())]
    fields = [line.pop(FIELDS) for line in lines]
    if where is None:
        return rows
    for line, held in zip(lines, where.holds(fields), strict=True):
        if isinstance(held, FilterFailed):
            line["image_error"] = error_of(held)
        elif not held:
            message = f"source.where does not hold: {where.text}"
            line["skip"] = {"stage": "read", "class": "Filtered", "message": message}
    for row in rows:
        if all(line["skip"] or line["image_error"] for line in row.get("lines", ())):
            row["image"] = None
    return rows


def _rows(job: JobSpec, item: ShardWork, *, source: Source, keep: Iterable[str]) -> Iterator[Row]:
    shard = item.shard
    place = {"source_uri": shard.uri, "shard_identity": shard.identity, "rows_total": shard.rows}
    reading = _Reading(source.read(shard, skip=item.done.answered_rows(job.units)))
    # A shard of known length needs no row of its own to say where it ends.
    is_marked = False
    for samples in _by_image(reading):
        lines = [_line(s, units=item.done.missing_units(s.index, job.units)) for s in samples]
        kept = {KEEP + name: [s.keep.get(name) for s in samples] for name in keep}
        yield {**place, "image": samples[0].image, "lines": lines, **kept}
        is_marked = shard.rows is not None
    if reading.rows_total is not None and not is_marked:
        yield {**place, "rows_total": reading.rows_total}


class _Reading:
    """The samples of a shard, to its end or to where the store fails.

    `rows_total` is null until the end was read. Without its end mark, a shard is read again, from
    there on, by the next pass.
    """

    def __init__(self, samples: Generator[Sample, None, int]) -> None:
        self._samples = samples
        self.rows_total: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        with contextlib.suppress(StoreUnavailable):
            self.rows_total = yield from self._samples


def _by_image(samples: Iterable[Sample]) -> Iterator[Sequence[Sample]]:
    """Neighbours that hold one image together, so many at most."""
    group: list[Sample] = []
    for sample in samples:
        if group and (len(group) == MOST_LINES or not _hold_one_image(group[0], sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _hold_one_image(a: Sample, b: Sample) -> bool:
    return a.image is not None and a.image is b.image


def _line(sample: Sample, *, units: Sequence[str]) -> Row:
    questions, conversation = sample.questions, sample.conversation
    line: Row = {
        "source_index": sample.index,
        "sample_id": sample.sample_id,
        "units": units,
        "image_error": error_of(sample.image_error),
        "skip": None,
        "error": error_of(sample.error),
        FIELDS: sample.fields,
    }
    if isinstance(questions, RowError):
        line["questions_error"] = error_of(questions)
    elif questions is not None:
        line["questions"] = [{"id": q.id, "question": q.text} for q in questions]
    if isinstance(conversation, RowError):
        line["conversation_error"] = error_of(conversation)
    elif conversation is not None:
        line["conversation"] = [{"role": t.role, "content": t.content} for t in conversation]
    return line
