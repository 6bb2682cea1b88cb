"""The file of a shard, in whatever store it is, and never shorter than it is.

    it is gone, forbidden or a folder    ShardUnreadable
    the store answers with a failure,
    or breaks off                        tried again a few times, then StoreUnavailable
    the store is silent                  its library has tried again: StoreUnavailable

Neither is an OSError: libraries that read the file pass them on, and take them for no damage of
their own formats.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import tenacity

from pipeline.sources.uris import shown
from pipeline.storage import failure_behind, filesystem, is_local, store_errors
from schemas.errors import ShardUnreadable, StoreUnavailable
from schemas.job import StorageSpec

BLOCK_BYTES = 4 * 2**20
"""What a store is asked for at once: an answer that breaks off is asked for again as a whole."""
TRIES = 5
FIRST_WAIT_S = 0.1
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)

T = TypeVar("T")


@contextmanager
def open_file(uri: str, storage: StorageSpec, *, cache: str | None = None) -> Iterator["ShardFile"]:
    """The file at `uri`, to be read at any place; `cache`: one of fsspec's, null for its default.

    Raises ShardUnreadable and StoreUnavailable, as reading the file does.
    """
    store = _Store(uri, timeout_s=storage.timeout_s)
    fs, path = filesystem(uri, storage)
    options = {"block_size": BLOCK_BYTES, **({"cache_type": cache} if cache else {})}
    with store.tried(lambda: fs.open(path, "rb", **options)) as file:
        yield ShardFile(file, store, is_local=is_local(fs))


class ShardFile(io.RawIOBase):
    """An open file. `failure`: why it could not be read on, for those whose libraries hide it."""

    def __init__(self, file: Any, store: "_Store", *, is_local: bool) -> None:
        self._file, self._store = file, store
        # A local file says by itself where it ends; some servers do not tell before they are read.
        self._size: int | None = None if is_local else getattr(file, "size", None)
        self.failure: ShardUnreadable | StoreUnavailable | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        at, n = self.tell(), -1 if size is None else size
        try:
            if self._size is None:
                return self._store.asked(lambda: bytes(self._file.read(n)))
            left = max(self._size - at, 0)
            return self._store.tried(self._whole, at, left if n < 0 else min(n, left))
        except (ShardUnreadable, StoreUnavailable) as error:
            self.failure = error
            raise

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _whole(self, at: int, n: int) -> bytes:
        self._file.seek(at)
        data = bytes(self._file.read(n))
        if len(data) < n:
            raise OSError(f"{len(data)} bytes came instead of {n}")
        return data


class _Store:
    """What fails in the store of one file."""

    def __init__(self, uri: str, *, timeout_s: float) -> None:
        self._name = shown(uri)
        self._timeout_s = timeout_s

    def tried(self, ask: Callable[..., T], *args: Any) -> T:
        """As `asked`, after some tries."""
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential_jitter(multiplier=FIRST_WAIT_S, jitter=FIRST_WAIT_S),
            stop=tenacity.stop_after_attempt(TRIES) | tenacity.stop_after_delay(self._timeout_s),
            reraise=True,
        )
        answer: T = tries(self.asked, ask, *args)
        return answer

    def asked(self, ask: Callable[..., T], *args: Any) -> T:
        """The answer of a store; raises ShardUnreadable and StoreUnavailable."""
        try:
            return ask(*args)
        except FINAL as error:
            failure = failure_behind(error) if isinstance(error, FileNotFoundError) else None
            if failure is not None:
                raise self._unavailable(failure) from error
            raise ShardUnreadable(f"{self._name}: {_final_reason(error)}") from error
        except _failures() as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: BaseException) -> StoreUnavailable:
        reason = str(error) or type(error).__name__
        return StoreUnavailable(f"{self._name}: the store failed while it was read: {reason}")


def _failures() -> tuple[type[Exception], ...]:
    """What a store raises; a web server that gives no ranges is a ValueError."""
    return (*store_errors(), ValueError)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, StoreUnavailable) and not isinstance(error.__cause__, ValueError)


def _final_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is gone since it was listed"
    return f"the file cannot be read: {error}"
