"""Rows between the stages as tests write them: image and line in one, where there is one line."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from pipeline.read import ReadTask, ShardWork, read_shards
from schemas.errors import StoreUnavailable
from schemas.job import JobSpec
from schemas.tables import KEEP, SAMPLE, SAMPLE_LINE, table_of, with_keep

LINE = [field.name for field in SAMPLE_LINE]


def tables_read(
    job: JobSpec,
    work: Iterable[ShardWork],
    *,
    keep: Mapping[str, pa.DataType] | None = None,
    limit: int | None = None,
    failures: list[StoreUnavailable] | None = None,
) -> list[pa.Table]:
    """What a read task gives; fails where a store does, unless `failures` takes that."""
    told = [] if failures is None else failures
    task = ReadTask([*work], limit)
    tables = [*read_shards(job, task, keep=keep or {}, on_failure=told.append)]
    assert failures is not None or not told
    return tables


def folded(*lines: Mapping[str, Any]) -> dict[str, Any]:
    """A SAMPLE row of lines that hold one image; what has no `source_index` is an end mark."""
    row = {name: value for name, value in lines[0].items() if name not in LINE}
    if "source_index" not in lines[0]:
        return row
    row |= {name: [each[name] for each in lines] for name in row if name.startswith(KEEP)}
    return {**row, "lines": [{n: v for n, v in each.items() if n in LINE} for each in lines]}


def sample_table(
    rows: Iterable[Mapping[str, Any]], keep: Mapping[str, pa.DataType] | None = None
) -> pa.Table:
    """SAMPLE rows of one line each."""
    return table_of([folded(row) for row in rows], with_keep(SAMPLE, keep or {}))


def unfolded(table: pa.Table) -> list[dict[str, Any]]:
    """The lines of all rows, each with what its row says; end marks have nothing of a line."""
    rows = []
    for row in table.to_pylist():
        lines = row.pop("lines")
        if lines is None:
            rows.append({"source_index": None, **row})
        for number, line in enumerate(lines or ()):
            kept = {name: row[name][number] for name in row if name.startswith(KEEP)}
            rows.append({**row, **line, **kept})
    return rows
