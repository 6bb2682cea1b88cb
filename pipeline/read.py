"""The first step: shards to tables of images with their lines, the end of each shard marked.

Knows what is still to be answered of each shard, but neither formats (`sources/`) nor ray.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.coverage import Ranges, ShardCoverage
from pipeline.script import columns_of, scripts_of
from pipeline.sources import open_source
from pipeline.sources.base import Reading, Sample, Shard
from schemas.errors import RowError, StoreUnavailable
from schemas.job import JobSpec
from schemas.tables import KEEP, SAMPLE, error_of, table_of, with_keep

MAX_TABLE_BYTES = 16 * 2**20
MAX_TABLE_LINES = 1024
MOST_LINES = 128
"""Of one row; an image with more has several rows."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ShardWork:
    """A shard, and what is answered of it already.

    `own`: rows that are asked these of their own questions only.
    """

    shard: Shard
    done: ShardCoverage
    own: Mapping[int, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadTask:
    """Shards that are read together, in order.

    `limit`: so many of their rows are wanted, the first ones; null for all. Where there is one,
    complete shards stand among them, to be counted.
    """

    work: Sequence[ShardWork]
    limit: int | None = None


def read_shards(
    job: JobSpec,
    task: ReadTask,
    *,
    keep: Mapping[str, pa.DataType],
    on_failure: Callable[[StoreUnavailable], None],
) -> Iterator[pa.Table]:
    """Tables of SAMPLE rows (plus kept columns), each of bounded size.

    Rows that have all their answers are left out; each shard's end is marked. Where a store fails,
    `on_failure` is told; the shard has no mark then, and the next pass reads on.
    """
    schema = with_keep(SAMPLE, keep)
    rows: list[Row] = []
    n_bytes = n_lines = 0
    for row in _rows(job, task, keep=keep, on_failure=on_failure):
        rows.append(row)
        n_bytes += sum(len(i or b"") for i in (row.get("image"), *(row.get("more_images") or ())))
        n_lines += len(row.get("lines", ()))
        if n_bytes >= MAX_TABLE_BYTES or n_lines >= MAX_TABLE_LINES:
            table = table_of(rows, schema)
            # What waits for a table to be taken should not hold its images twice.
            rows, n_bytes, n_lines = [], 0, 0
            del row
            yield table
            del table
    if rows:
        yield table_of(rows, schema)


def _rows(
    job: JobSpec,
    task: ReadTask,
    *,
    keep: Mapping[str, pa.DataType],
    on_failure: Callable[[StoreUnavailable], None],
) -> Iterator[Row]:
    fields = columns_of(scripts_of(job))
    source = open_source(job.source, keep=keep, fields=fields)
    unfinished = [item for item in task.work if not item.done.is_complete(job.units)]
    source.expect(item.shard for item in unfinished)
    left = task.limit
    for _, pieces in itertools.groupby(task.work, key=lambda item: item.shard.uri):
        rows_total: int | None = None
        for item in pieces:
            if item.done.is_complete(job.units):
                rows_total = item.done.rows_total
                continue
            beyond = Ranges() if left is None else Ranges.starting(left)
            skip = item.done.answered_rows(job.units) | beyond
            reading = Reading(source.read(item.shard, skip=skip))
            yield from _rows_of(
                reading, item, keep=keep, fields=fields, units=job.units, on_failure=on_failure
            )
            rows_total = rows_total if reading.rows_total is None else reading.rows_total
        if left is not None:
            # The numbers of what follows a shard without an end are not known.
            left = 0 if rows_total is None else max(left - rows_total, 0)
            if left == 0:
                return


def _rows_of(  # noqa: PLR0913 (all but two by name)
    reading: Reading[Sample],
    item: ShardWork,
    *,
    keep: Iterable[str],
    fields: Collection[str],
    units: Sequence[str],
    on_failure: Callable[[StoreUnavailable], None],
) -> Iterator[Row]:
    shard, done = item.shard, item.done
    place = {"source_uri": shard.uri, "shard_identity": shard.identity, "rows_total": shard.rows}
    # A shard of known length needs no row of its own to say where it ends.
    is_marked = False
    for samples in _by_image(_until_failure(reading, on_failure)):
        asked = [_with_questions(s, item.own.get(s.index)) for s in samples]
        lines = [_line(s, units=done.missing_units(s.index, units), fields=fields) for s in asked]
        kept = {KEEP + name: [s.keep.get(name) for s in samples] for name in keep}
        images = {"image": samples[0].image, "more_images": [*samples[0].more_images] or None}
        yield {**place, **images, "lines": lines, **kept}
        is_marked = shard.rows is not None
    if reading.rows_total is not None and not is_marked:
        yield {**place, "rows_total": reading.rows_total}


def _until_failure(
    samples: Iterable[Sample], on_failure: Callable[[StoreUnavailable], None]
) -> Iterator[Sample]:
    try:
        yield from samples
    except StoreUnavailable as error:
        on_failure(error)


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
    if a.image is None or a.image is not b.image or len(a.more_images) != len(b.more_images):
        return False
    return all(one is other for one, other in zip(a.more_images, b.more_images, strict=True))


def _with_questions(sample: Sample, ids: Collection[str] | None) -> Sample:
    if ids is None or sample.questions is None or isinstance(sample.questions, RowError):
        return sample
    return replace(sample, questions=tuple(q for q in sample.questions if q.id in ids))


def _line(sample: Sample, *, units: Sequence[str], fields: Collection[str]) -> Row:
    questions, conversation = sample.questions, sample.conversation
    line: Row = {
        "source_index": sample.index,
        "sample_id": sample.sample_id,
        "units": units,
        "columns": _looked_at(sample, fields) if fields else None,
        "image_error": error_of(sample.image_error),
        "skip": None if sample.skip is None else _filtered(sample.skip),
        "error": error_of(sample.error),
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


def _looked_at(sample: Sample, fields: Collection[str]) -> str:
    """As JSON, without what is missing; what JSON does not have (a date) is text."""
    known = {name: value for name, value in sample.fields.items() if name in fields}
    there = {name: value for name, value in known.items() if value is not None}
    return json.dumps(there, default=str, ensure_ascii=False)


def _filtered(message: str) -> dict[str, str]:
    """Why a row is skipped; no RowError, since nothing is wrong with it."""
    return {"stage": "read", "class": "Filtered", "message": message}
