"""The seam between a source format and the rest: shards, and the samples that they hold.

A source lists shards without opening them and reads any rows of a shard with stable indexes, so
that every source can be resumed by construction. It knows no ray and decodes no image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from pipeline.coverage import Ranges
from schemas.errors import RowError


@dataclass(frozen=True)
class Shard:
    """One file of a source. `identity` changes when its content does: the etag, or size and mtime.

    `rows` is the number of rows where the format tells it without reading, else null.
    """

    uri: str
    identity: str
    rows: int | None = None


@dataclass(frozen=True)
class Question:
    """One of a row's own questions."""

    id: str
    text: str


@dataclass(frozen=True)
class Turn:
    """One message of an earlier conversation: role is `user`, `assistant` or `system`."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One row of a shard: an image as it lies in the store, not yet decoded.

    `questions` is null where the source has none for this row, and a RowError where they cannot be
    known. `error` is set where the row itself cannot be read; then there is no image.
    """

    index: int
    sample_id: str
    image: bytes | None = None
    questions: Sequence[Question] | RowError | None = None
    conversation: Sequence[Turn] | RowError | None = None
    keep: Mapping[str, object] = field(default_factory=dict)
    error: RowError | None = None


class Source(Protocol):
    """What a source format has to offer."""

    def keep_types(self) -> Mapping[str, pa.DataType]:
        """The Arrow type of each column of `source.keep`."""

    def list(self) -> Sequence[Shard]:
        """All shards, in a stable order, without opening any.

        Raises SpecError where a path does not exist or may not be read.
        """

    def read(self, shard: Shard, *, skip: Ranges) -> Iterator[Sample]:
        """The samples whose index is not in `skip`, in order, to the end of the shard.

        Skipped samples are passed over without being read where the format allows it. A shard
        that breaks off ends with one sample whose `error` is ShardUnreadable. Never raises for
        what the shard holds.
        """
