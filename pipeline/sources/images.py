"""The `images` format: every file is an image, and a shard of one row.

So a file that is added or removed shifts no other row. The format has no columns: a row is its
bytes and its name. Costs one listing entry and one identity a file. Images are fetched ahead of
their turn, as those that rows of other formats name.
"""

import json
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources.base import IMAGE_SUFFIXES, KEY, Sample, Shard
from pipeline.sources.fetch import Fetcher
from pipeline.sources.filter import marked
from pipeline.sources.imagelists import SUFFIXES, listed_images
from pipeline.sources.uris import shard_of, told_apart
from pipeline.storage import filesystem, has_suffix, list_files, uri_of
from pipeline.where import columns_of, where_of
from schemas.errors import SpecError, StoreUnavailable
from schemas.job import ColumnsSpec, SourceSpec

PATTERN_CHARACTERS = "*?[{"


class Images:
    """Image files, one row each; `sample_id` and `__key__` are the name below the listed folder."""

    def __init__(
        self, spec: SourceSpec, *, fetcher: Fetcher | None = None, fields: Collection[str] = ()
    ) -> None:
        _refuse_columns(spec)
        self.spec = spec
        self._fetcher = fetcher or Fetcher(spec)
        self._where = where_of(spec.where)
        self._fields = columns_of(self._where) | {*fields}
        self._lists = [path for path in spec.paths if has_suffix(path, SUFFIXES)]
        self._others = [path for path in spec.paths if path not in self._lists]
        folders = [spec.image_root or _folder(path) for path in self._lists]
        self.roots = {_root(path, spec) for path in [*self._others, *folders]}
        self._expected: Iterator[tuple[Shard, Sample]] = iter(())
        self._due: dict[Shard, None] = {}
        self._failure: StoreUnavailable | None = None

    def keep_types(self) -> Mapping[str, pa.DataType]:
        return {name: pa.string() for name in self.spec.keep}

    def list(self) -> Sequence[Shard]:
        shards = {shard.uri: shard for shard in self._files()}
        for path in self._lists:
            shards |= {s.uri: s for s in listed_images(path, self.spec, self._fetcher)}
        return [shards[uri] for uri in sorted(shards)]

    def _files(self) -> Iterator[Shard]:
        suffixes = [f".{suffix}" for suffix in IMAGE_SUFFIXES]
        if self._others:
            files = list_files(self._others, self.spec.storage, suffixes=suffixes)
            names = told_apart(file.uri for file in files)
            yield from (shard_of(file, names, rows=1) for file in files)

    def expect(self, shards: Iterable[Shard]) -> None:
        self._due, self._failure = dict.fromkeys(shards), None
        self._expected = self._samples(list(self._due))

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int]:
        if 0 not in skip:
            yield self._next(shard)
        return 1

    def _next(self, shard: Shard) -> Sample:
        is_due = shard in self._due
        self._due.pop(shard, None)
        # What was expected after a failure would fail alike, one after the other.
        if is_due and self._failure:
            raise self._failure
        try:
            for expected, sample in self._expected if is_due else ():
                if expected == shard:
                    return sample
            [(_, sample)] = self._samples([shard])
        except StoreUnavailable as error:
            self._failure = error
            raise
        return sample

    def _samples(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, Sample]]:
        named = ((self._sample(shard), shard) for shard in shards)
        asked = (
            (pair, pair[1].place if pair[0].wants_image else None)
            for pair in marked(named, self._where)
        )
        for (sample, shard), image in self._fetcher.fetch_for(asked):
            yield shard, sample.with_images([image])

    def _sample(self, shard: Shard) -> Sample:
        """Without its image."""
        name = self._name(shard.uri)
        keep = {column: json.dumps(name, ensure_ascii=False) for column in self.spec.keep}
        fields = {KEY: name} if KEY in self._fields else {}
        return Sample(0, name, keep=keep, fields=fields)

    def _name(self, uri: str) -> str:
        """The path below the nearest listed folder, else the base name."""
        folder, _, name = uri.rpartition("/")
        while folder:
            if folder in self.roots:
                return uri[len(folder) :].lstrip("/")
            folder, _, _ = folder.rpartition("/")
        return name


def _refuse_columns(spec: SourceSpec) -> None:
    for key in ColumnsSpec.model_fields:
        value = getattr(spec.columns, key)
        if value != getattr(ColumnsSpec(), key):
            raise SpecError(
                f"source.columns.{key}: {value!r}: format `images` has no columns; "
                "remove the key or use a format that has them"
            )
    for name in spec.keep:
        if name != KEY:
            raise SpecError(
                f"source.keep: {name!r}: format `images` has no columns but {KEY}; remove it"
            )


def _folder(path: str) -> str:
    head, slash, _ = path.rpartition("/")
    return head + slash or "."


def _root(path: str, spec: SourceSpec) -> str:
    """The folder that a path of the spec searches: the path itself, or what precedes a pattern."""
    starts = [path.index(character) for character in PATTERN_CHARACTERS if character in path]
    if starts:
        path = _folder(path[: min(starts)])
    return uri_of(*filesystem(path, spec.storage)).rstrip("/")
