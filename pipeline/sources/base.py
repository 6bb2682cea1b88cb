"""The seam between a source format and the rest: shards, and the samples that they hold.

A source lists shards without opening them and reads any rows of a shard with stable indexes, so
that every source can be resumed by construction. It knows no ray and decodes no image.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import pyarrow as pa

from pipeline.coverage import Ranges
from schemas.errors import RowError, about_image

KEY = "__key__"
"""The column that every format has: the source's own name of a row."""

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
"""Endings of image files, in lower case and without the dot."""


T = TypeVar("T")


def valid_text(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which neither UTF-8 nor Arrow can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Shard:
    """One file of a source. `identity` changes when its content does: the etag, or size and mtime.

    `rows` is the number of rows where the format tells it without reading, else null. `piece` is
    (i, n): the i-th of n parts of a large file, to be read apart. All pieces share URI and
    identity, rows keep their index in the file, and each piece ends with the rows of the file.
    `location` is the URI to be opened where that holds more than people may see.
    """

    uri: str
    identity: str
    rows: int | None = None
    piece: tuple[int, int] = (0, 1)
    location: str | None = None

    @property
    def place(self) -> str:
        """What is opened."""
        return self.location or self.uri


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
    """One row of a shard: an image as it lies in the store, not yet decoded, or several.

    `questions` is null where the source has none for this row, and a RowError where they cannot be
    known. `image_error` is set where the row is known and its image cannot be had: each of its
    questions fails with it. `error` is set where the row itself cannot be read: it has one failed
    answer, whatever is asked. With either, there is no image. `more_images`: those behind the
    first, null as that is where one is still to be fetched. `skip`: why the row is not asked
    anything. `fields`: the values of the columns that are looked at.
    """

    index: int
    sample_id: str
    image: bytes | None = None
    more_images: Sequence[bytes | None] = ()
    image_error: RowError | None = None
    questions: Sequence[Question] | RowError | None = None
    conversation: Sequence[Turn] | RowError | None = None
    keep: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, object] = field(default_factory=dict)
    skip: str | None = None
    error: RowError | None = None

    @property
    def wants_image(self) -> bool:
        """Whether anything is to be asked about it."""
        return self.skip is None and self.image_error is None and self.error is None

    @property
    def n_bytes(self) -> int:
        """Of its images, as far as they are there."""
        return sum(len(image or b"") for image in (self.image, *self.more_images))

    def without_images(self) -> "Sample":
        """The sample as if its images were still to be fetched."""
        return replace(self, image=None, more_images=(None,) * len(self.more_images))

    def with_images(self, fetched: Sequence[bytes | RowError | None]) -> "Sample":
        """The sample with its images as they were fetched; None for one that is in the row.

        Nothing changes where none was: nobody has asked for them.
        """
        if self.error is not None or self.image_error is not None:
            return self
        if all(image is None for image in fetched):
            return self
        images = [self.image, *self.more_images]
        for number, image in enumerate(fetched):
            if isinstance(image, RowError):
                error = about_image(image, number=number + 1, count=len(images))
                return replace(self.without_images(), image_error=error)
            images[number] = images[number] if image is None else image
        return replace(self, image=images[0], more_images=images[1:])


class Reading(Generic[T]):
    """What reading a shard gives; `rows_total`: of the shard, null until its end was read."""

    def __init__(self, given: Generator[T, None, int | None]) -> None:
        self._given = given
        self.rows_total: int | None = None

    def __iter__(self) -> Iterator[T]:
        self.rows_total = yield from self._given


class Source(Protocol):
    """What a source format has to offer."""

    def keep_types(self) -> Mapping[str, pa.DataType]:
        """The Arrow type of each column of `source.keep`."""

    def list(self) -> Sequence[Shard]:
        """All shards, in a stable order, without opening any.

        Raises SpecError where a path does not exist or may not be read.
        """

    def expect(self, shards: Iterable[Shard]) -> None:
        """These are read next, in this order: what is small may be fetched ahead."""

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int | None]:
        """Yield the samples whose index is not in `skip`, to the end of the shard.

        They come in order or, where several rows name one image, image by image, in an order that
        never changes; then neighbours on one image hold the same bytes object. Returns the number
        of rows of the shard, skipped ones and the unreadable last one included; None where `skip`
        has no end and a format that does not tell the number was not read further than that.

        What `source.where` filters out is marked (`filter.py`), and no image of it is fetched.
        Skipped samples are passed over without being read where the format allows it. A shard
        that breaks off ends with one sample whose `error` is ShardUnreadable; where a format tells
        how many rows are lost, each of them is such a sample. Never raises for
        what the shard holds; raises StoreUnavailable where the store fails.
        """
