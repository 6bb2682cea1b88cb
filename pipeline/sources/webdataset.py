"""The `webdataset` format: tar shards in which the members of one sample follow each other.

A member's key is its path up to the first dot of its base name, the rest is its suffix, in lower
case. Folders, base names that start with a dot and names without a suffix are passed over.
Neighbours of one key are one sample; a key that comes back later, or a suffix that the sample has
already, begins a new one. A row's index is the number of its sample in the shard.

The columns of a row are the keys of its `.json` member, and `txt` and `cls` from the members of
that name, which win. This module decodes no image and decides no question.
"""

import json
import tarfile
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources.archive import Archive, open_archive
from pipeline.sources.base import (
    IMAGE_SUFFIXES,
    KEY,
    Question,
    Reading,
    Sample,
    Shard,
    Turn,
    valid_text,
)
from pipeline.sources.filter import marked
from pipeline.sources.jsonvalues import json_text, label, parsed
from pipeline.sources.questions import parse_conversation, parse_questions
from pipeline.sources.uris import shard_of, told_apart
from pipeline.storage import list_files
from pipeline.where import columns_of, where_of
from schemas.errors import (
    ConversationMalformed,
    ImageMissing,
    ImageTooLarge,
    QuestionsMalformed,
    RowError,
    ShardUnreadable,
    about_image,
)
from schemas.job import SourceSpec

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
TEXT_SUFFIXES = ("txt", "cls")
MOST_COLUMN_BYTES = 16 * 2**20
"""A larger member is no column."""


@dataclass
class _Group:
    """The members of one sample so far: suffix -> content, None where nobody asked for it.

    `unread`: why the content of a member cannot be had, without its name.
    """

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)
    unread: dict[str, RowError] = field(default_factory=dict)


@dataclass(frozen=True)
class _Columns:
    """What a row knows about itself, or why its `.json` member cannot say."""

    values: Mapping[str, object]
    broken: str | None = None


class WebDataset:
    """Tar shards, plain or compressed, read as one stream each."""

    def __init__(self, spec: SourceSpec, *, fields: Collection[str] = ()) -> None:
        self.spec = spec
        columns = spec.columns
        self.image_suffixes = tuple(name.lower().lstrip(".") for name in columns.images)
        self._where = where_of(spec.where)
        self._fields = columns_of(self._where) | {*fields}
        asked = {columns.id, columns.questions, columns.conversation, *spec.keep, *self._fields}
        self.suffixes = {"json", *(suffix for suffix in TEXT_SUFFIXES if suffix in asked)}

    def keep_types(self) -> Mapping[str, pa.DataType]:
        return {name: pa.string() for name in self.spec.keep}

    def list(self) -> Sequence[Shard]:
        files = list_files(self.spec.paths, self.spec.storage, suffixes=SHARD_SUFFIXES)
        names = told_apart(file.uri for file in files)
        return [shard_of(file, names) for file in files]

    def expect(self, shards: Iterable[Shard]) -> None:
        """A shard is read by itself."""

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int | None]:
        reading = Reading(self._samples(shard, skip=skip))
        for sample, _ in marked(reading, self._where):
            yield sample
        return reading.rows_total

    def _samples(
        self, shard: Shard, *, skip: Ranges
    ) -> Generator[tuple[Sample, None], None, int | None]:
        index = 0
        try:
            with open_archive(shard.place, self.spec.storage) as archive:
                for group in self._groups(archive, skip=skip):
                    if index >= skip.tail:
                        return None
                    if index not in skip:
                        yield self._sample(shard, index, group), None
                    index += 1
        except ShardUnreadable as error:
            if index not in skip:
                yield Sample(index, "", error=_unreadable(error, index)), None
            index += 1
        return index

    def _groups(self, archive: Archive, *, skip: Ranges) -> Iterator[_Group]:
        """The samples, each once it is whole; the one at which the archive breaks never is."""
        group: _Group | None = None
        index = -1
        for member in archive.members():
            key, suffix = _split(member.name)
            if not (key and suffix) or not (member.isreg() or member.islnk() or member.issym()):
                continue
            if group is None or key != group.key or suffix in group.members:
                if group is not None:
                    yield group
                group = _Group(key)
                index += 1
            wanted = index not in skip and self._wants(suffix, group)
            group.members[suffix] = None
            if (why := self._why_unread(member, suffix)) is not None:
                group.unread[suffix] = why
            elif wanted:
                group.members[suffix] = archive.read(member)
        if group is not None:
            yield group

    def _wants(self, suffix: str, group: _Group) -> bool:
        if suffix in self.suffixes or suffix in self.image_suffixes:
            return True
        known = not self.image_suffixes and suffix in IMAGE_SUFFIXES
        return known and IMAGE_SUFFIXES.isdisjoint(group.members)

    def _why_unread(self, member: tarfile.TarInfo, suffix: str) -> RowError | None:
        if not member.isreg():
            return ImageMissing(
                f"is a link to {valid_text(member.linkname)!r}; write the tar with --dereference "
                "--hard-dereference"
            )
        if member.issparse():
            return ImageMissing("is stored as a sparse file; write the tar without --sparse")
        if suffix in self.suffixes:
            if member.size > MOST_COLUMN_BYTES:
                return ImageMissing(f"has {member.size} bytes, more than {MOST_COLUMN_BYTES}")
        elif member.size > self.spec.max_image_bytes:
            return ImageTooLarge(
                f"has {member.size} bytes, more than the {self.spec.max_image_bytes} of "
                "source.max_image_bytes; raise it to decode this image"
            )
        return None

    def _sample(self, shard: Shard, index: int, group: _Group) -> Sample:
        subject = f"{shard.uri}: sample {valid_text(group.key)!r}"
        columns = _columns(group)
        found = self._images(group, subject=subject)
        image, *more = found if isinstance(found, tuple) else (None,)
        return Sample(
            index=index,
            sample_id=label(columns.values.get(self.spec.columns.id), default=group.key),
            image=image,
            more_images=more,
            image_error=found if isinstance(found, ImageTooLarge) else None,
            questions=self._questions(columns, subject=subject),
            conversation=self._conversation(columns, subject=subject),
            keep={name: json_text(columns.values.get(name)) for name in self.spec.keep},
            fields={name: columns.values.get(name) for name in self._fields},
            error=found if isinstance(found, ImageMissing) else None,
        )

    def _images(
        self, group: _Group, *, subject: str
    ) -> tuple[bytes, ...] | ImageMissing | ImageTooLarge:
        """In the order of the spec."""
        count = len(self.image_suffixes)
        images = []
        for number, suffix in enumerate(self.image_suffixes or (None,), 1):
            wanted = IMAGE_SUFFIXES if suffix is None else {suffix}
            image = self._image(group, wanted, subject=subject)
            if not isinstance(image, bytes):
                return about_image(image, number=number, count=count or 1)
            images.append(image)
        return tuple(images)

    def _image(
        self, group: _Group, wanted: AbstractSet[str], *, subject: str
    ) -> bytes | ImageMissing | ImageTooLarge:
        suffix = next((name for name in group.members if name in wanted), None)
        image = None if suffix is None else group.members[suffix]
        if image is not None:
            return image
        if suffix is not None:
            why = group.unread[suffix]
            kind = ImageTooLarge if isinstance(why, ImageTooLarge) else ImageMissing
            return kind(f"{subject}: member .{suffix} {why}")
        kinds = ", ".join(f".{name}" for name in sorted(wanted))
        there = ", ".join(f".{valid_text(name)}" for name in group.members)
        return ImageMissing(
            f"{subject} has no image member ({kinds}), only {there}; "
            "name its suffix in source.columns.image"
        )

    def _questions(
        self, columns: _Columns, *, subject: str
    ) -> Sequence[Question] | QuestionsMalformed | None:
        name = self.spec.columns.questions
        if columns.broken and name not in columns.values:
            return QuestionsMalformed(f"{subject}: {columns.broken}; write the member again")
        return parse_questions(columns.values.get(name), subject=f"{subject}: column {name!r}")

    def _conversation(
        self, columns: _Columns, *, subject: str
    ) -> Sequence[Turn] | ConversationMalformed | None:
        name = self.spec.columns.conversation
        if name is None:
            return None
        if columns.broken and name not in columns.values:
            return ConversationMalformed(f"{subject}: {columns.broken}; write the member again")
        return parse_conversation(columns.values.get(name), subject=f"{subject}: column {name!r}")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member; one of them is empty where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), suffix.lower()


def _columns(group: _Group) -> _Columns:
    values: dict[str, object] = {}
    broken = None
    if "json" in group.unread:
        broken = f"member .json {group.unread['json']}"
    elif (data := group.members.get("json")) is not None:
        try:
            values.update(_json_object(data))
        except ValueError as error:
            broken = f"member .json cannot be read: {error}"
    for suffix in TEXT_SUFFIXES:
        if (text := group.members.get(suffix)) is not None:
            values[suffix] = text.decode("utf-8", "replace")
    return _Columns({**values, KEY: group.key}, broken)


def _json_object(data: bytes) -> dict[str, object]:
    value = parsed(data.decode(json.detect_encoding(data), "surrogatepass"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def _unreadable(error: ShardUnreadable, index: int) -> ShardUnreadable:
    return ShardUnreadable(
        f"{error}; sample number {index} and what follows it are lost, the {index} before it are "
        "not; write the shard again and rerun the job"
    )
