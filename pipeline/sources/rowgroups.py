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
from pipeline.storage import filesystem, store_errors
from schemas.errors import ShardUnreadable, StoreUnavailable
from schemas.job import StorageSpec

BUFFER_BYTES = 4 * 2**20
"""What is read at once of a column, where its page is no larger."""
BATCH_BYTES = 8 * 2**20
MOST_BATCH_ROWS = 64
"""Few: a writer may have stored equal images once, and then sizes tell nothing."""

BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError)
"""What pyarrow raises on bytes that are not what they should be; some are a store's errors too."""


class GroupBroken(Exception):
    """A row group cannot be read on from here."""


class RowGroups:
    """An open Parquet file. `rows`: of the whole file. `ranges`: [start, stop) of each group."""

    def __init__(self, uri: str, file: "_Watched") -> None:
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
            self._raise_store_failure()
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
            except BROKEN as error:
                self._raise_store_failure()
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

    def _raise_store_failure(self) -> None:
        if self._file.failure is not None:
            raise StoreUnavailable(
                f"{self._uri}: the store failed while it was read: {self._file.failure}"
            ) from self._file.failure


@contextmanager
def open_row_groups(uri: str, storage: StorageSpec) -> Iterator[RowGroups]:
    """Raises ShardUnreadable for what is no Parquet file, is gone or forbidden, and
    StoreUnavailable where the store fails.
    """
    try:
        fs, path = filesystem(uri, storage)
        # Arrow buffers by itself; a cache of one range would be thrown away at each column.
        file = fs.open(path, "rb", cache_type="none")
    except FileNotFoundError as error:
        raise ShardUnreadable(f"{uri}: the file is gone since it was listed") from error
    except (PermissionError, IsADirectoryError) as error:
        raise ShardUnreadable(f"{uri}: the file cannot be read: {error}") from error
    except store_errors() as error:
        raise StoreUnavailable(f"{uri}: the store failed while it was opened: {error}") from error
    with file:
        yield RowGroups(uri, _Watched(file))


class _Watched:
    """A file that remembers the store's failure, which pyarrow would pass on as one of its own."""

    def __init__(self, file: Any) -> None:
        self.failure: Exception | None = None
        self._file = file
        self._size: int | None = None

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        """Left to whoever has opened the file."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        at = int(self._file.seek(offset, whence))
        if whence == 2 and offset == 0:
            self._size = at
        return at

    def read(self, n: int = -1) -> bytes:
        at = self.tell()
        try:
            data: bytes = self._file.read(n)
            if self._size is not None and len(data) < min(n, self._size - at):
                raise OSError(f"{len(data)} bytes came instead of {n}")
        except _read_errors() as error:
            self.failure = error
            raise
        return data


def _read_errors() -> tuple[type[Exception], ...]:
    """What a store raises; a web server that gives no ranges is a ValueError."""
    return (*store_errors(), ValueError)


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
