"""Rows cut to batches, of so many rows and about so many bytes at most; a batch packed as one row.

Ray Data cuts blocks by rows or by bytes, and what it hands to a stage by rows only. A batch that is
one row to it stays as it was cut: its images are neither joined with others nor copied.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa

PACKED = "batch"


def batches_of(tables: Iterable[pa.Table], *, rows: int, n_bytes: int) -> Iterator[pa.Table]:
    """The rows of all tables, in order. A batch ends once it has `rows`, or `n_bytes` or more."""
    waiting: list[pa.Table] = []
    n_rows = size = 0
    for table in tables:
        start = 0
        while start < table.num_rows:
            piece = table.slice(start, rows - n_rows)
            start += piece.num_rows
            waiting.append(piece)
            n_rows += piece.num_rows
            size += piece.nbytes
            del piece
            if n_rows == rows or size >= n_bytes:
                n_rows = size = 0
                yield _taken(waiting)
        # Not held while the next one is made: its images may be all that there is room for.
        del table
    if waiting:
        yield _taken(waiting)


def _taken(tables: list[pa.Table]) -> pa.Table:
    joined = pa.concat_tables(tables)
    tables.clear()
    return joined


def packed(batch: pa.Table) -> pa.Table:
    """A table of one row that holds all rows of the batch."""
    # Joining copies, even what is in one piece.
    pieces = batch.to_batches()
    [piece] = pieces if len(pieces) == 1 else batch.combine_chunks().to_batches()
    rows = piece.to_struct_array()
    return pa.table({PACKED: pa.LargeListArray.from_arrays([0, len(rows)], rows)})


def unpacked(batches: pa.Table) -> pa.Table:
    """The rows of packed batches, in order."""
    pieces = (chunk.flatten() for chunk in batches[PACKED].chunks)
    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(piece) for piece in pieces])
