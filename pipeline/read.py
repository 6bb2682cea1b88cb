"""The first step: shards to tables of samples, with the end of each shard marked.

Knows what is still to be answered of each shard, but neither formats (`sources/`) nor ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.coverage import ShardCoverage
from pipeline.sources import open_source
from pipeline.sources.base import Sample, Shard, Source
from pipeline.where import Where, parse_where
from schemas.errors import FilterFailed, RowError, StoreUnavailable
from schemas.job import JobSpec
from schemas.tables import KEEP, SAMPLE, error_of, table_of, with_keep

MAX_TABLE_BYTES = 16 * 2**20
MAX_TABLE_ROWS = 1024
FIELDS = "fields"
"""What `source.where` looks at; stays here."""


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
    where = parse_where(job.source.where) if job.source.where else None
    rows: list[dict[str, Any]] = []
    n_bytes = 0
    for row in _rows(job, work, source=open_source(job.source, keep=keep)):
        rows.append(row)
        n_bytes += len(row.get("image") or b"")
        if n_bytes >= MAX_TABLE_BYTES or len(rows) >= MAX_TABLE_ROWS:
            yield table_of(_filtered(rows, where), schema)
            rows, n_bytes = [], 0
    if rows:
        yield table_of(_filtered(rows, where), schema)


def _filtered(rows: list[dict[str, Any]], where: Where | None) -> list[dict[str, Any]]:
    """The rows, without FIELDS; where the condition does not hold, without their image."""
    fields = [row.pop(FIELDS, {}) for row in rows]
    held_by = where.holds(fields) if where else [True] * len(rows)
    for row, held in zip(rows, held_by, strict=True):
        if where is None or held is True or "source_index" not in row or row["error"]:
            continue
        row["image"] = None
        if isinstance(held, FilterFailed):
            row["image_error"] = error_of(held)
        else:
            message = f"source.where does not hold: {where.text}"
            row["skip"] = {"stage": "read", "class": "Filtered", "message": message}
    return rows


def _rows(job: JobSpec, work: Sequence[ShardWork], *, source: Source) -> Iterator[dict[str, Any]]:
    for item in work:
        place: dict[str, Any] = {
            "source_uri": item.shard.uri,
            "shard_identity": item.shard.identity,
        }
        samples = source.read(item.shard, skip=item.done.answered_rows(job.units))
        is_marked = False
        while True:
            try:
                sample = next(samples)
            except StopIteration as end:
                if not is_marked:
                    yield {**place, "rows_total": end.value}
                break
            except StoreUnavailable:
                # Without its end mark, the shard is read again from here by the next pass.
                break
            # A shard of known length needs no row of its own to say where it ends.
            is_marked = item.shard.rows is not None
            place["rows_total"] = item.shard.rows
            units = item.done.missing_units(sample.index, job.units)
            yield {**place, "units": units, **_columns(sample)}


def _columns(sample: Sample) -> dict[str, Any]:
    questions, conversation = sample.questions, sample.conversation
    columns: dict[str, Any] = {
        "source_index": sample.index,
        "sample_id": sample.sample_id,
        "image": sample.image,
        "image_error": error_of(sample.image_error),
        "error": error_of(sample.error),
        FIELDS: sample.fields,
        **{KEEP + name: value for name, value in sample.keep.items()},
    }
    if isinstance(questions, RowError):
        columns["questions_error"] = error_of(questions)
    elif questions is not None:
        columns["questions"] = [{"id": q.id, "question": q.text} for q in questions]
    if isinstance(conversation, RowError):
        columns["conversation_error"] = error_of(conversation)
    elif conversation is not None:
        columns["conversation"] = [{"role": t.role, "content": t.content} for t in conversation]
    return columns
