"""The `images` format: every file is an image, and a shard of one row.

So a file that is added or removed shifts no other row. The format has no columns: a row is its
bytes and its name. Costs one listing entry and one identity a file.
"""

import json
from collections.abc import Generator, Mapping, Sequence

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources.base import IMAGE_SUFFIXES, KEY, Sample, Shard
from pipeline.storage import filesystem, list_files, store_errors, uri_of
from pipeline.where import columns_of
from schemas.errors import ShardUnreadable, SpecError, StoreUnavailable
from schemas.job import ColumnsSpec, SourceSpec

PATTERN_CHARACTERS = "*?[{"


class Images:
    """Image files, one row each; `sample_id` and `__key__` are the name below the listed folder."""

    def __init__(self, spec: SourceSpec) -> None:
        _refuse_columns(spec)
        self.spec = spec
        self._fields = columns_of(spec.where)
        self.roots = {_root(path, spec) for path in spec.paths}

    def keep_types(self) -> Mapping[str, pa.DataType]:
        return {name: pa.string() for name in self.spec.keep}

    def list(self) -> Sequence[Shard]:
        files = list_files(
            self.spec.paths,
            self.spec.storage,
            suffixes=[f".{suffix}" for suffix in IMAGE_SUFFIXES],
        )
        return [Shard(file.uri, file.identity, rows=1) for file in files]

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int]:
        if 0 not in skip:
            yield self._sample(shard)
        return 1

    def _sample(self, shard: Shard) -> Sample:
        name = self._name(shard.uri)
        try:
            fs, path = filesystem(shard.uri, self.spec.storage)
            image = bytes(fs.cat_file(path))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            reason = "it is gone" if isinstance(error, FileNotFoundError) else str(error)
            return Sample(0, name, error=ShardUnreadable(f"{shard.uri}: cannot be read: {reason}"))
        except store_errors() as error:
            raise StoreUnavailable(f"{shard.uri}: the store failed: {error}") from error
        keep = {column: json.dumps(name, ensure_ascii=False) for column in self.spec.keep}
        fields = {KEY: name} if KEY in self._fields else {}
        return Sample(0, name, image=image, keep=keep, fields=fields)

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


def _root(path: str, spec: SourceSpec) -> str:
    """The folder that a path of the spec searches: the path itself, or what precedes a pattern."""
    starts = [path.index(character) for character in PATTERN_CHARACTERS if character in path]
    if starts:
        head, slash, _ = path[: min(starts)].rpartition("/")
        path = head + slash or "."
    return uri_of(*filesystem(path, spec.storage)).rstrip("/")
