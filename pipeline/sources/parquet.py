"""The `parquet` format: tables in which a row is an image, its columns what is known of it.

The image is in a binary column, in a struct {bytes, path} as Hugging Face's `datasets` writes it,
or in a text column as a path or URL and then fetched, as it is where a struct has a path only. A
list of these is several images. A row's index is its place in the file. Its own name, `__key__`, is
the column of that name, else the path or URL of the first image, else the index.

Large files are listed in pieces, which take whole row groups. Each lost row is a failed row, since
a file says how many it has; a file that does not is one failed row, and its first piece says so.

Kept columns keep their type, which is that of the first file. Where another file has another type,
rows whose value would change fail; a column that another file does not have is null.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources.base import KEY, Sample, Shard
from pipeline.sources.columns import Unfit, column_type, has_null_type, image_columns
from pipeline.sources.fetch import Fetcher
from pipeline.sources.filter import marked
from pipeline.sources.rowgroups import GroupBroken, RowGroups, open_row_groups
from pipeline.sources.tablerows import TableRows
from pipeline.sources.uris import shard_of, told_apart
from pipeline.storage import list_files
from pipeline.where import columns_of, where_of
from schemas.errors import ShardUnreadable, SpecError, StoreUnavailable
from schemas.job import ColumnsSpec, SourceSpec

SUFFIXES = (".parquet", ".pq")
PIECE_BYTES = 128 * 2**20
MOST_LOOKED_AT = 32
"""Files that are opened for the types, where those before are damaged or hold only nulls."""

_Asked = tuple[Sample, Sequence[str | None]]
"""A sample, and the URI of each of its images that is still to be fetched; none where none is."""


class Parquet:
    """Parquet files. `keep`: the types of the kept columns, where they are known already."""

    def __init__(
        self,
        spec: SourceSpec,
        *,
        keep: Mapping[str, pa.DataType] | None = None,
        fetcher: Fetcher | None = None,
        fields: Collection[str] = (),
    ) -> None:
        self._spec = spec
        self._where = where_of(spec.where)
        self._fields = columns_of(self._where) | {*fields}
        self._keep = keep if spec.keep else {}
        self._fetcher = fetcher or Fetcher(spec)
        self._shards: Sequence[Shard] | None = None

    def list(self) -> Sequence[Shard]:
        """Every file, in as many pieces as its size calls for."""
        files = list_files(self._spec.paths, self._spec.storage, suffixes=SUFFIXES)
        names = told_apart(file.uri for file in files)
        self._shards = [
            shard_of(file, names, piece=(number, pieces))
            for file in files
            for pieces in [max(1, -(-file.size // PIECE_BYTES))]
            for number in range(pieces)
        ]
        return self._shards

    def keep_types(self) -> Mapping[str, pa.DataType]:
        """Looks into the first file.

        Raises SpecError where a column that the spec names is not there, or where it does not tell
        which column is the image.
        """
        shards = self.list() if self._shards is None else self._shards
        files = [shard for shard in shards if shard.piece[0] == 0]
        types: dict[str, pa.DataType] = {}
        for number, (uri, schema) in enumerate(self._schemas(files)):
            if number == 0:
                _check_columns(schema, self._spec, uri=uri)
            for name in self._spec.keep:
                if name not in types or has_null_type(types[name]):
                    types[name] = _type_of(schema, name, default=types.get(name, pa.null()))
            if not any(map(has_null_type, types.values())):
                break
        if missing := set(self._spec.keep) - set(types):
            raise SpecError(
                f"source.keep: {sorted(missing)[0]!r}: none of the first {len(files)} files of "
                "source.path is a whole Parquet file, so its type is not known"
            )
        self._keep = types
        return types

    def _schemas(self, files: Sequence[Shard]) -> Iterator[tuple[str, pa.Schema]]:
        for file in files[:MOST_LOOKED_AT]:
            try:
                with open_row_groups(file.uri, self._spec.storage) as table:
                    yield file.uri, table.schema
            except ShardUnreadable:
                continue
            except StoreUnavailable as error:
                raise SpecError(f"source.path: {error}; check the store") from error

    def expect(self, shards: Iterable[Shard]) -> None:
        """A shard is read by itself."""

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int]:
        try:
            with open_row_groups(shard.place, self._spec.storage) as table:
                asked = self._asked(table, shard, skip=skip)
                with closing(self._fetcher.fetch_all(asked)) as fetched:
                    for sample, images in fetched:
                        yield sample.with_images(images)
                return table.rows
        except ShardUnreadable as error:
            if shard.piece[0] == 0 and 0 not in skip:
                yield Sample(0, "", error=error)
            return 1

    def _asked(self, table: RowGroups, shard: Shard, *, skip: Ranges) -> Iterator[_Asked]:
        """The rows of a shard's piece, each with the URIs of its images if they are wanted."""
        if self._keep is None:
            self.keep_types()
        rows = TableRows(
            shard.uri,
            table.schema,
            spec=self._spec,
            keep=self._keep or {},
            fields=self._fields,
        )
        number, pieces = shard.piece
        groups = len(table.ranges)
        for group in range(groups * number // pieces, groups * (number + 1) // pieces):
            for sample, paths in marked(_samples(table, group, rows, skip=skip), self._where):
                wanted = paths if sample.wants_image else ()
                uris = [path and self._fetcher.resolve(path, beside=shard.place) for path in wanted]
                yield sample, uris


def _samples(
    table: RowGroups, group: int, rows: TableRows, *, skip: Ranges
) -> Iterator[tuple[Sample, Sequence[str | None]]]:
    """The rows of a row group; those that are lost in it, too."""
    at, stop = table.ranges[group]
    wanted = Ranges.of([(at, stop)]) - skip
    end = wanted.pairs[-1][1] if wanted.pairs else at
    try:
        batches = table.batches(group, rows.columns)
        while at < end:
            batch = next(batches)
            for index in range(at, at + batch.num_rows):
                if index in wanted:
                    yield rows.sample(batch, index - at, index=index)
            at += batch.num_rows
    except GroupBroken as error:
        reason = ShardUnreadable(
            f"{rows.uri}: row group {group} is damaged: its rows {at} to {stop - 1} are lost "
            f"({error}); write the file again and rerun the job"
        )
        for index in range(at, stop):
            if index in wanted:
                yield Sample(index, str(index), error=reason), ()


def _check_columns(schema: pa.Schema, spec: SourceSpec, *, uri: str) -> None:
    """Raises SpecError for what the spec says of the columns and the file does not have."""
    default = ColumnsSpec()
    asked = [
        (f"source.columns.{key}", name)
        for key in ColumnsSpec.model_fields
        if (named := getattr(spec.columns, key)) != getattr(default, key)
        for name in ([named] if isinstance(named, str) else named)
    ]
    for key, name in (*asked, *(("source.keep", name) for name in spec.keep)):
        if name == KEY and name not in schema.names:
            continue
        try:
            column_type(schema, name)
        except Unfit as error:
            close = get_close_matches(name, schema.names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SpecError(f"{key}: {uri}: {error}{hint}") from error
    try:
        image_columns(schema, spec.columns.images)
    except Unfit as error:
        raise SpecError(f"source.columns.image: {uri}: {error}") from error


def _type_of(schema: pa.Schema, name: str, *, default: pa.DataType) -> pa.DataType:
    if name == KEY and name not in schema.names:
        return pa.string()
    try:
        return column_type(schema, name)
    except Unfit:
        return default
