"""Records put aside in a temporary file, and given back key by key.

In memory is a hash and a place for each record, not the records.
"""

import contextlib
import hashlib
import pickle
import tempfile
from array import array
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np

from schemas.errors import JobError

HASH_BYTES = 8


def hash_of(key: str) -> int:
    """The same in every process, below 2**64."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES)
    return int.from_bytes(digest.digest(), "little")


class PutAside:
    """Records under keys. All are added before the first is asked for."""

    def __init__(self) -> None:
        self._hashes, self._places = array("Q"), array("Q")
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="lavaflow-")  # noqa: SIM115 (__exit__)
        except OSError as error:
            raise _no_room(error) from error

    def add(self, key: str, record: object) -> None:
        """The record is one that pickle takes. Raises JobError where there is no room for it."""
        data = pickle.dumps((key, record), pickle.HIGHEST_PROTOCOL)
        try:
            self._file.write(data)
        except OSError as error:
            raise _no_room(error) from error
        self._hashes.append(hash_of(key))
        self._places.append(self._end)
        self._end += len(data)

    def __len__(self) -> int:
        return len(self._places)

    def grouped(self) -> Iterator[Any]:
        """All records, those of one key together: keys by their first record, each in order."""
        _, first, inverse = np.unique(self._as_numbers, return_index=True, return_inverse=True)
        for number in np.argsort(first[inverse], kind="stable"):
            yield self._record(number)[1]

    def get(self, key: str) -> Any:
        """The first record of the key; None where there is none."""
        wanted = hash_of(key)
        order = self._by_hash
        at = np.searchsorted(self._as_numbers, np.uint64(wanted), sorter=order)
        while at < len(order) and self._hashes[order[at]] == wanted:
            found, record = self._record(order[at])
            if found == key:
                return record
            at += 1
        return None

    @cached_property
    def _as_numbers(self) -> np.ndarray:
        return np.array(self._hashes, dtype=np.uint64)

    @cached_property
    def _by_hash(self) -> np.ndarray:
        return np.argsort(self._as_numbers, kind="stable")

    def _record(self, number: int) -> tuple[str, Any]:
        try:
            self._file.seek(self._places[number])
            record: tuple[str, Any] = pickle.load(self._file)
        except OSError as error:
            raise _no_room(error) from error
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _no_room(error: OSError) -> JobError:
    return JobError(
        f"{tempfile.gettempdir()}: the rows of a manifest cannot be put aside there to be sorted: "
        f"{error}; free some space, or let TMPDIR name a larger disk"
    )
