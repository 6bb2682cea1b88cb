"""The `manifest` format: files of JSON whose rows name images and, often, questions about them.

JSONL, plain or compressed by gzip; a JSON list of objects; VQA's question JSON. A row's index is
the number of its line, blank ones not counted, or its position in the list. `manifestrows.py` says
what a row may look like. A row that cannot be read is a failed row; so is the first row that is
lost where the file breaks off.

Rows are given image by image, images by their first row, so that each is fetched once; rows on
several images stand together where these are the same, in the same order. For that the rows of a
file are put aside on the local disk before the first of them is given. Large files are listed in
pieces; each is read whole, and takes its share of the images.

Where VQA's annotation JSON is given beside the questions (`*questions*.json`,
`*annotations*.json`), its columns can be kept as if the questions had them; it has no rows itself.
"""

import itertools
import json
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, closing
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources.annotations import Annotations, annotations_among, is_called
from pipeline.sources.base import Sample, Shard
from pipeline.sources.fetch import Fetcher
from pipeline.sources.filter import marked
from pipeline.sources.grouping import PutAside, hash_of
from pipeline.sources.jsonrows import Entry, Layout, NoRow, open_rows
from pipeline.sources.manifestrows import (
    IMAGE_NAMES,
    Line,
    ManifestRows,
    Row,
    image_column,
    names_in,
)
from pipeline.sources.uris import shard_of, told_apart
from pipeline.storage import StoredFile, list_files
from pipeline.where import columns_of, where_of
from schemas.errors import (
    ManifestMalformed,
    RowError,
    ShardUnreadable,
    SpecError,
    StoreUnavailable,
)
from schemas.job import SourceSpec

SUFFIXES = tuple(f".{kind}{more}" for kind in ("jsonl", "ndjson", "json") for more in ("", ".gz"))
PIECE_BYTES = 64 * 2**20
MOST_PIECES = 16
"""More would spend their time on reading the same file."""
LINES_AT_ONCE = 128
"""Rows of one image that are in memory together."""


class _Lines(NamedTuple):
    """Rows of the same images; `is_first`: there were none of them before."""

    samples: Sequence[Sample]
    is_first: bool


class Manifest:
    """Files of JSON."""

    def __init__(
        self, spec: SourceSpec, *, fetcher: Fetcher | None = None, fields: Collection[str] = ()
    ) -> None:
        self._spec = spec
        self._where = where_of(spec.where)
        self._fields = columns_of(self._where) | {*fields}
        self._fetcher = fetcher or Fetcher(spec)

    def keep_types(self) -> Mapping[str, pa.DataType]:
        return {name: pa.string() for name in self._spec.keep}

    def list(self) -> Sequence[Shard]:
        """Every file, in as many pieces as its size calls for."""
        files = self._files()
        names = told_apart(file.uri for file in files)
        return [
            replace(
                shard_of(file, names, piece=(number, pieces)),
                identity=self._identity(file, files),
            )
            for file in files
            for pieces in [min(max(1, -(-file.size // PIECE_BYTES)), MOST_PIECES)]
            for number in range(pieces)
        ]

    def _files(self) -> Sequence[StoredFile]:
        return list_files(self._spec.paths, self._spec.storage, suffixes=SUFFIXES)

    def _identity(self, file: StoredFile, files: Sequence[StoredFile]) -> str:
        """Kept annotations are a part of what is answered."""
        is_annotated = self._spec.keep and is_called(file, "questions")
        beside = annotations_among(files) if is_annotated else ()
        return "+".join([file.identity, *(each.identity for each in beside)])

    def expect(self, shards: Iterable[Shard]) -> None:
        """A shard is read by itself."""

    def read(self, shard: Shard, *, skip: Ranges) -> Generator[Sample, None, int]:
        """As `Source.read`, but image by image."""
        with ExitStack() as stack:
            aside = stack.enter_context(PutAside())
            scan = _Scan(self._spec, shard, aside, skip=skip)
            scan.run()
            annotations = Annotations(stack.enter_context(PutAside()), self._spec.keep)
            if len(aside) and scan.layout == "questions" and self._spec.keep:
                for file in annotations_among(self._known_files()):
                    annotations.read(file.uri, self._spec.storage)
            elif scan.layout == "annotations" and scan.error is None:
                self._expect_questions(scan)
            named = _named_samples(aside, scan.rows(self._fields), annotations)
            asked = self._asked(marked(named, self._where), beside=shard.place)
            fetched = stack.enter_context(closing(self._fetcher.fetch_all(asked)))
            images: Sequence[bytes | RowError | None] = ()
            for some, found in fetched:
                images = found if some.is_first or any(i is not None for i in found) else images
                for sample in some.samples:
                    yield sample.with_images(images)
            if scan.error is not None and scan.is_wanted(scan.rows_total - 1):
                yield Sample(scan.rows_total - 1, "", error=scan.error)
        return scan.rows_total

    def _expect_questions(self, scan: "_Scan") -> None:
        """Annotations alone are an error."""
        if not any(is_called(file, "questions") for file in self._known_files()):
            scan.end(
                ManifestMalformed(
                    f"{scan.name}: it holds VQA's annotations, and no file of its questions "
                    "(*questions*.json) is in source.path; give both"
                )
            )

    def _known_files(self) -> Sequence[StoredFile]:
        try:
            return self._files()
        except SpecError as error:
            raise StoreUnavailable(
                f"what lies beside a manifest cannot be listed: {error}"
            ) from error

    def _asked(
        self, named: Iterable[tuple[Sample, tuple[str, ...]]], *, beside: str
    ) -> Iterator[tuple[_Lines, Sequence[str]]]:
        """Rows to be given together, with the URIs of their images where they are to be fetched."""
        for names, group in itertools.groupby(named, key=itemgetter(1)):
            uris = [self._fetcher.resolve(name, beside=beside) for name in names]
            is_first = True
            while samples := [sample for sample, _ in itertools.islice(group, LINES_AT_ONCE)]:
                is_wanted = any(sample.wants_image for sample in samples)
                yield _Lines(samples, is_first), uris if is_wanted else ()
                is_first, uris = False, [] if is_wanted else uris


def _named_samples(
    aside: PutAside, rows: ManifestRows, annotations: Annotations
) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    """What was put aside as samples, with the images as each row names them."""
    for line in itertools.starmap(Line, aside.grouped()):
        yield rows.sample(line, beside=annotations.of(line.row)), rows.images_of(line)


class _Scan:
    """One reading of a file, which puts the rows aside that are wanted of it.

    `rows_total`: of the whole file, the first lost one included, whose `error` says why.
    """

    def __init__(self, spec: SourceSpec, shard: Shard, aside: PutAside, *, skip: Ranges) -> None:
        self._spec, self._shard, self._aside, self._skip = spec, shard, aside, skip
        self._images = spec.columns.images
        self._header: Mapping[str, Any] = {}
        self.name = shard.uri
        self.layout: Layout = "lines"
        self.rows_total = 0
        self.error: RowError | None = None

    def run(self) -> None:
        """Raises StoreUnavailable, and JobError where there is no room to put rows aside."""
        try:
            with open_rows(self._shard.place, self._spec.storage) as file:
                self.layout, self._header = file.layout, file.header
                for entry in file.entries():
                    if self.layout != "annotations":
                        self._take(entry, place=f"{file.unit} {entry.number}")
        except ShardUnreadable as error:
            lost = f"row {self.rows_total} and what follows it are lost"
            self.end(ShardUnreadable(f"{error}; {lost}; write the file again and rerun the job"))

    def end(self, error: RowError) -> None:
        """One more row, the last one, which cannot be read."""
        self.error = error
        self.rows_total += 1

    def rows(self, fields: AbstractSet[str]) -> ManifestRows:
        """How to understand what was put aside."""
        is_named_by_number = not self._images and self.layout == "questions"
        images = () if is_named_by_number else self._images or IMAGE_NAMES[:1]
        return ManifestRows(
            self._shard.uri, spec=self._spec, images=images, header=self._header, fields=fields
        )

    def is_wanted(self, index: int, key: str | None = None) -> bool:
        """Whether a row is still to be given, by this piece; `key`: which image it is on."""
        if index in self._skip:
            return False
        number, pieces = self._shard.piece
        return pieces == 1 or hash_of(_lone(index) if key is None else key) % pieces == number

    def _take(self, entry: Entry, *, place: str) -> None:
        index = self.rows_total
        self.rows_total += 1
        # Which column holds the image is told by the first rows, given or not.
        if index in self._skip and self._images:
            return
        row: Row | str
        key = None
        try:
            row = entry.row()
            self._images = self._images or image_column(row)
            key = self._key(row)
        except NoRow as reason:
            row = str(reason)
        if self.is_wanted(index, key):
            self._aside.add(_lone(index) if key is None else key, (index, place, row))

    def _key(self, row: Row) -> str | None:
        """What rows of one image have in common."""
        columns = self._images or ("image_id",)
        values = [value for column in columns for value in names_in(row.get(column))]
        if not all(isinstance(value, str | int) and value != "" for value in values):
            return None
        return json.dumps(values) if len(values) > 1 else "".join(map(str, values)) or None


def _lone(index: int) -> str:
    """The key of a row that has no image."""
    return f"\0{index}"
