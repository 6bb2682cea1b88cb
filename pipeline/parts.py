"""Parts: Parquet files of answers, each with a footer that says what it holds.

This module reads and makes them; where they lie and which of them count is decided in `commit.py`.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.footer import TALLY_COLUMNS, Footer, Tally
from pipeline.storage import Output
from schemas.errors import JobError

ANSWERS = "answers"
STAGING = "staging"
SUFFIX = ".parquet"
FOOTER_KEY = b"lavaflow"
ROWS_PER_GROUP = 10_000

RECEIPT = pa.schema([pa.field("part", pa.string()), pa.field("footer", pa.string())])
"""What the write step returns for a part that is durable: its name, its footer's JSON."""


@dataclass(frozen=True)
class PartInfo:
    """A part as its file's end describes it."""

    name: str
    rows: int
    schema: pa.Schema
    footer: Footer


def tally_of(answers: pa.Table) -> Tally:
    return Tally.of(answers.select(list(TALLY_COLUMNS)).to_pylist())


def part_bytes(answers: pa.Table, footer: Footer) -> bytes:
    """A whole part: the answers (zstd, a checksum a page) with their footer."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, answers.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        writer.write_table(answers, row_group_size=ROWS_PER_GROUP)
        writer.add_key_value_metadata({FOOTER_KEY: footer.to_bytes()})
    return sink.getvalue()


def read_info(output: Output, name: str) -> PartInfo:
    """What a part says about itself, without its rows.

    Raises JobError for a file that is not a whole part, FileNotFoundError where there is none.
    """
    return output.use(name, lambda file: _info(file, name=name, place=f"{output.uri}/{name}"))


def read_part(output: Output, name: str) -> tuple[pa.Table, Footer]:
    """The rows and the footer of a part. Raises as `read_info` does, and for damaged rows."""
    info, batches = open_part(output, name)
    return pa.Table.from_batches(batches, schema=info.schema), info.footer


def open_part(output: Output, name: str) -> tuple[PartInfo, Iterator[pa.RecordBatch]]:
    """What a part says about itself, and all columns of its rows, some rows at a time.

    The file is in memory when this returns: of the store, nothing is raised by the batches. They
    raise JobError where a page is not what was written. Raises as `read_info` does.
    """
    data, place = pa.BufferReader(output.read(name)), f"{output.uri}/{name}"
    return _info(data, name=name, place=place), _batches(data, place=place)


def read_columns(output: Output, name: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a part, without the others. Raises as `read_part` does."""

    def read(file: Any) -> pa.Table:
        # Told here already: a bare OSError would be taken for the store's, and tried again.
        with _damage_as_job_error(f"{output.uri}/{name}"):
            return pq.read_table(file, columns=list(columns), page_checksum_verification=True)

    return output.use(name, read)


def _info(file: object, *, name: str, place: str) -> PartInfo:
    with _damage_as_job_error(place, what="is not a whole Parquet file"):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
    return PartInfo(name, metadata.num_rows, schema, _footer(metadata, name=place))


def _batches(file: object, *, place: str) -> Iterator[pa.RecordBatch]:
    with _damage_as_job_error(place):
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        for batch in parquet.iter_batches(batch_size=ROWS_PER_GROUP):
            # Parts of other versions may have no checksums; text that is not UTF-8 is found so.
            batch.validate(full=True)
            yield batch.replace_schema_metadata(None)


@contextlib.contextmanager
def _damage_as_job_error(place: str, *, what: str = "its rows are damaged") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Arrow tells much damage as a bare OSError; what a store raises is more than that.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        told = " ".join(str(error).split())
        raise JobError(
            f"{place}: {what} ({told}); move it away and run the job again: what it held is "
            "answered again"
        ) from error


def _footer(metadata: pq.FileMetaData, *, name: str) -> Footer:
    data = (metadata.metadata or {}).get(FOOTER_KEY)
    if data is None:
        raise JobError(
            f"{name}: has no `lavaflow` footer, so it was not written by lavaflow; move it away"
        )
    return Footer.from_bytes(data, name=name)
