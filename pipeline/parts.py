"""Parts: Parquet files of answers, each with a footer that says what it holds.

This module reads and makes them; where they lie and which of them count is decided in `commit.py`.
"""

import io
from dataclasses import dataclass

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

RECEIPT = pa.schema(
    [
        pa.field("part", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("footer", pa.string()),
    ]
)
"""What the write step returns for a part that is durable: its name, its size, its footer's JSON."""


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
    """A whole part: the answers (zstd) with their footer."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, answers.schema, compression="zstd") as writer:
        writer.write_table(answers, row_group_size=ROWS_PER_GROUP)
        writer.add_key_value_metadata({FOOTER_KEY: footer.to_bytes()})
    return sink.getvalue()


def read_info(output: Output, name: str) -> PartInfo:
    """What a part says about itself, without its rows.

    Raises JobError for a file that is not a whole part, FileNotFoundError where there is none.
    """
    with output.open(name) as file:
        metadata = _metadata(file, name=f"{output.uri}/{name}")
    footer = _footer(metadata, name=f"{output.uri}/{name}")
    schema = metadata.schema.to_arrow_schema().remove_metadata()
    return PartInfo(name, metadata.num_rows, schema, footer)


def read_part(output: Output, name: str) -> tuple[pa.Table, Footer]:
    """The rows and the footer of a part. Raises as `read_info` does."""
    data = pa.BufferReader(output.read(name))
    footer = _footer(_metadata(data, name=f"{output.uri}/{name}"), name=f"{output.uri}/{name}")
    return pq.read_table(data).replace_schema_metadata(None), footer


def _metadata(file: object, *, name: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except pa.ArrowException as error:
        raise JobError(
            f"{name}: is not a whole Parquet file ({error}); move it away and run the job again: "
            "what it held is answered again"
        ) from error


def _footer(metadata: pq.FileMetaData, *, name: str) -> Footer:
    data = (metadata.metadata or {}).get(FOOTER_KEY)
    if data is None:
        raise JobError(
            f"{name}: has no `lavaflow` footer, so it was not written by lavaflow; move it away"
        )
    return Footer.from_bytes(data, name=name)
