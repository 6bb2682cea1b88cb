"""A Parquet file read by its row groups, a few rows at a time, believing nothing that is damaged.

    whole file    no footer, or one that contradicts itself     ShardUnreadable
    row group     readable up to a damaged page                 GroupBroken, after the rows before

Row groups say how many rows they hold, so the rows that are lost in one are known, and the ones
after it are read. What the store does wrong is StoreUnavailable and never taken for damage. In
memory are the page at hand of each column, which is as large as its writer made it, and one batch.
Knows columns, not samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.columns import plain
from pipeline.sources.opened import ShardFile, open_file
from schemas.errors import RowError, ShardUnreadable, StoreUnavailable
from schemas.job import StorageSpec

BUFFER_BYTES = 4 * 2**20
"""What is read at once of a column, where its page is no larger."""
BATCH_BYTES = 8 * 2**20
MOST_BATCH_ROWS = 64
"""Few: a writer may have stored equal images once, and then sizes tell nothing."""

BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError)
"""What pyarrow raises on bytes that are not what they should be, or makes of a store's failure."""


class GroupBroken(Exception):
    """A row group cannot be read on from here."""


class RowGroups:
    """An open Parquet file. `rows`: of the whole file. `ranges`: [start, stop) of each group."""

    def __init__(self, uri: str, file: ShardFile) -> None:
        self._uri, self._file = uri, file
        try:
            self._parquet = pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                pre_buffer=False,
                buffer_size=BUFFER_BYTES,
                page_checksum_verification=True,
            )
            self.schema: pa.Schema = self._parquet.schema_arrow
            sizes = _group_sizes(self._parquet.metadata)
        except BROKEN as error:
            if file.failure is not None:
                raise file.failure from error
            raise ShardUnreadable(
                f"{uri}: is no whole Parquet file: {_reason(error)}; write the file again and "
                "rerun the job"
            ) from error
        self.rows = sum(sizes)
        self.ranges = list(pairwise(accumulate(sizes, initial=0)))

    def batches(self, number: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a group; raises GroupBroken at the first that cannot be read.

        A batch that cannot be read is read again row by row, since a part of it may be whole.
        """
        start, stop = self.ranges[number]
        done, reason = 0, "it holds fewer rows than its footer tells"
        for is_last_try in (False, True):
            try:
                most = 1 if is_last_try else self._batch_rows(number)
                for batch in self._read(number, columns, most=most, after=done):
                    done += batch.num_rows
                    yield batch
            except (RowError, *BROKEN) as error:
                self._raise_failure()
                reason = _reason(error)
            if done == stop - start:
                return
        raise GroupBroken(reason)

    def _read(
        self, number: int, columns: Sequence[str], *, most: int, after: int
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most so many rows, without the first `after` rows."""
        passed = 0
        for batch in self._parquet.iter_batches(
            batch_size=most, row_groups=[number], columns=list(columns), use_threads=False
        ):
            known = min(max(after - passed, 0), batch.num_rows)
            passed += batch.num_rows
            if known < batch.num_rows:
                arrays = [_plain(batch.column(name).slice(known)) for name in columns]
                yield pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _batch_rows(self, number: int) -> int:
        # Not from the columns' own metadata: damaged, they make pyarrow abort the process.
        start, stop = self.ranges[number]
        n_bytes = self._parquet.metadata.row_group(number).total_byte_size
        rows: int = BATCH_BYTES * (stop - start) // max(n_bytes, 1)
        return min(max(rows, 1), MOST_BATCH_ROWS)

    def _raise_failure(self) -> None:
        # A file that is gone by now, too: who opens it again will find that no row is there.
        if self._file.failure is not None:
            raise StoreUnavailable(str(self._file.failure)) from self._file.failure


@contextmanager
def open_row_groups(uri: str, storage: StorageSpec) -> Iterator[RowGroups]:
    """Raises ShardUnreadable for what is no Parquet file, is gone or forbidden, and
    StoreUnavailable where the store fails.
    """
    # Arrow buffers by itself; a cache of one range would be thrown away at each column.
    with open_file(uri, storage, cache="none") as file:
        yield RowGroups(uri, file)


def _group_sizes(metadata: Any) -> list[int]:
    """Raises ValueError for counts that cannot be: nobody should wait for rows that are not."""
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if sum(sizes) != metadata.num_rows or any(size < 0 for size in sizes):
        raise ValueError("its footer contradicts itself about the number of rows")
    return sizes


def _plain(array: pa.Array) -> pa.Array:
    kind = plain(array.type)
    return array if array.type == kind else array.cast(kind)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
