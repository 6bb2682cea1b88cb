"""Rows between the stages as tests write them: image and line in one, where there is one line."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from schemas.tables import KEEP, SAMPLE, SAMPLE_LINE, table_of, with_keep

LINE = [field.name for field in SAMPLE_LINE]


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
