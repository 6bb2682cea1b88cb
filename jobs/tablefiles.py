"""The files of an answer table, read whole for `verify`: whose rows they hold, what is wrong."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.parts import ANSWERS, STAGING, SUFFIX, PartInfo, open_part
from pipeline.storage import Output, store_errors
from schemas.errors import JobError, SpecError

IDENTITY = ("source_uri", "source_index", "question_id", "turn", "sample_number")
OUTCOME = ("status", "error_class")
ERROR = ("error_stage", "error_class", "error_message")


@dataclass(frozen=True)
class Fault:
    """A file under `answers/` that is not as it should be."""

    file: str
    reason: str


def read_table(
    output: Output, *, schema: pa.Schema, versions: Mapping[str, str]
) -> tuple[pa.Table, int, list[Fault]]:
    """The rows that are there, how many files are staged, and what is wrong with the files.

    `versions`: the identity of each shard of the source. Raises SpecError where the store fails.
    """
    tables, faults = [], []
    try:
        for name in output.names(ANSWERS, suffix=""):
            rows, reasons = _read_file(output, name, schema=schema, versions=versions)
            tables.append(rows)
            faults += [Fault(name, reason) for reason in reasons]
        staged = len(output.names(STAGING, suffix=""))
    except store_errors() as error:
        raise SpecError(
            f"{output.uri} cannot be read ({error}); check the path and the credentials"
        ) from error
    return pa.concat_tables([_no_rows(schema), *tables]), staged, faults


def _no_rows(schema: pa.Schema) -> pa.Table:
    return pa.schema([schema.field(name) for name in (*IDENTITY, *OUTCOME)]).empty_table()


def _read_file(
    output: Output, name: str, *, schema: pa.Schema, versions: Mapping[str, str]
) -> tuple[pa.Table, list[str]]:
    """Identity and outcome of every row of a whole part, and what is wrong with the file."""
    try:
        info, batches = _open_part(output, name, schema=schema)
        rows = pa.concat_tables([_checked(schema.empty_table()), *map(_checked, batches)])
    except JobError as error:
        return _no_rows(schema), [str(error)]
    reasons = (
        _footer_fault(info, rows=rows),
        _version_fault(info, versions=versions),
        _rows_fault(rows, "misanswered", "an answer where status is not ok, or none where it is"),
        _rows_fault(rows, "unexplained", f"status failed without all of {', '.join(ERROR)}"),
    )
    return rows.select([*IDENTITY, *OUTCOME]), [reason for reason in reasons if reason]


def _open_part(
    output: Output, name: str, *, schema: pa.Schema
) -> tuple[PartInfo, Iterator[pa.RecordBatch]]:
    """Raises JobError for what is not a whole part with the columns of the answer table."""
    if not name.endswith(SUFFIX):
        raise JobError(f"{output.uri}/{name}: is no {SUFFIX} file; move it away")
    info, batches = open_part(output, name)
    if not info.schema.equals(schema):
        raise JobError(
            f"{output.uri}/{name}: its columns are {info.schema.names} instead of {schema.names}, "
            "or have other types"
        )
    return info, batches


def _checked(rows: pa.RecordBatch | pa.Table) -> pa.Table:
    """Identity and outcome of rows, and whether the other columns of the outcome fit it."""
    columns = {name: rows[name] for name in (*IDENTITY, *OUTCOME)}
    explained = reduce(pc.and_, (pc.is_valid(rows[name]) for name in ERROR))
    columns["misanswered"] = pc.xor(_has(rows, "ok"), pc.is_valid(rows["answer"]))
    columns["unexplained"] = pc.and_not(_has(rows, "failed"), explained)
    return pa.table(columns)


def _has(rows: pa.RecordBatch | pa.Table, status: str) -> pa.Array | pa.ChunkedArray:
    return pc.fill_null(pc.equal(rows["status"], status), False)


def _rows_fault(rows: pa.Table, column: str, what: str) -> str | None:
    odd = rows.filter(rows[column])
    if not odd.num_rows:
        return None
    first = odd.slice(0, 1).select(list(IDENTITY)).to_pylist()[0]
    return f"{odd.num_rows} rows have {what}; the first is {first}"


def _version_fault(info: PartInfo, *, versions: Mapping[str, str]) -> str | None:
    """A shard that was replaced calls for the same rows, but what is there answers the old one."""
    stale = [s for s in info.footer.shards if versions.get(s.uri, s.identity) != s.identity]
    if not stale:
        return None
    uri, was = stale[0].uri, stale[0].identity
    more = f"; so it does of {len(stale) - 1} more" if len(stale) > 1 else ""
    return f"answers another version of {uri}: was {was!r}, is now {versions[uri]!r}{more}"


def _footer_fault(info: PartInfo, *, rows: pa.Table) -> str | None:
    tally = info.footer.tally
    failed = rows.filter(_has(rows, "failed"))
    failures = {error: found.count for error, found in tally.failures.items()}
    told = ({s: n for s, n in tally.counts.items() if n}, failures)
    there = (counts_of(rows["status"]), counts_of(failed["error_class"]))
    return None if told == there else f"its footer tells {told}, its rows are {there}"


def counts_of(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(v["values"]): v["counts"] for v in pc.value_counts(column).to_pylist()}
