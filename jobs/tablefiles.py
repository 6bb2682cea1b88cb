"""The files of an answer table, read whole for `verify`: whose rows they hold, what is wrong."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Coverage, ShardCoverage
from pipeline.fold import added_coverage
from pipeline.footer import Footer
from pipeline.parts import ANSWERS, STAGING, SUFFIX, PartInfo, open_part, read_info
from pipeline.storage import Output, store_errors
from pipeline.versions import Versions
from schemas.errors import JobError, SpecError

IDENTITY = ("source_uri", "source_index", "question_id", "turn", "sample_number")
OUTCOME = ("status", "error_class")
ERROR = ("error_stage", "error_class", "error_message")


@dataclass(frozen=True)
class Fault:
    """A file under `answers/` that is not as it should be."""

    file: str
    reason: str


@dataclass(frozen=True)
class Files:
    """What lies in an output. `rows`: IDENTITY and OUTCOME of every answer; `covered`: what each
    whole part says that it covers; `staged`: files that the next run has to fold.
    """

    rows: pa.Table
    covered: Mapping[str, Sequence[ShardCoverage]]
    staged: int
    faults: Sequence[Fault]


def read_files(output: Output, *, schema: pa.Schema) -> Files:
    """Read the table whole. Raises SpecError where the store fails."""
    tables, faults, footers = [_no_rows(schema)], [], {}
    try:
        for name in output.names(ANSWERS, suffix=""):
            try:
                info, rows = _read_file(output, name, schema=schema)
            except JobError as error:
                faults.append(Fault(name, str(error)))
                continue
            tables.append(rows.select([*IDENTITY, *OUTCOME]))
            footers[name] = info.footer
            faults += [Fault(name, reason) for reason in _reasons(info, rows)]
        names = output.names(STAGING, suffix="")
        staged = [name for name in names if _has_to_be_folded(output, name, footers.values())]
    except store_errors() as error:
        raise SpecError(
            f"{output.uri} cannot be read ({error}); check the path and the credentials"
        ) from error
    covered = {name: footer.shards for name, footer in footers.items()}
    return Files(pa.concat_tables(tables), covered, len(staged), faults)


def _has_to_be_folded(output: Output, name: str, table: Iterable[Footer]) -> bool:
    """Not so what is in the table: an upload that was given up may arrive when its second try has
    been folded already. The next run removes it."""
    try:
        footer = read_info(output, name).footer
    except FileNotFoundError:
        return False
    except JobError:
        return True
    same = [each for each in table if not each.fingerprint.differences(footer.fingerprint)]
    covered = Coverage(shard for each in same for shard in each.shards)
    return footer.again or bool(added_coverage(footer.shards, covered=covered))


def _no_rows(schema: pa.Schema) -> pa.Table:
    return pa.schema([schema.field(name) for name in (*IDENTITY, *OUTCOME)]).empty_table()


def _read_file(output: Output, name: str, *, schema: pa.Schema) -> tuple[PartInfo, pa.Table]:
    """Identity and outcome of every row of a part. Raises JobError where it is not whole."""
    info, batches = _open_part(output, name, schema=schema)
    return info, pa.concat_tables([_checked(schema.empty_table()), *map(_checked, batches)])


def _reasons(info: PartInfo, rows: pa.Table) -> Iterator[str]:
    reasons = (
        _footer_fault(info, rows=rows),
        _rows_fault(rows, "misanswered", "an answer where status is not ok, or none where it is"),
        _rows_fault(rows, "unexplained", f"status failed without all of {', '.join(ERROR)}"),
    )
    yield from filter(None, reasons)


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


def version_faults(
    covered: Mapping[str, Sequence[ShardCoverage]], versions: Versions
) -> Iterator[Fault]:
    """A shard that was replaced calls for the same rows, but what is there answers the old one."""
    for name, shards in covered.items():
        stale = [s for s in shards if s.uri in versions.current and not versions.stand(s)]
        if stale:
            uri, was = stale[0].uri, stale[0].identity
            more = f"; so it does of {len(stale) - 1} more" if len(stale) > 1 else ""
            now = versions.current[uri]
            yield Fault(
                name, f"answers another version of {uri}: was {was!r}, is now {now!r}{more}"
            )


def _footer_fault(info: PartInfo, *, rows: pa.Table) -> str | None:
    tally = info.footer.tally
    failed = rows.filter(_has(rows, "failed"))
    failures = {error: found.count for error, found in tally.failures.items()}
    told = ({s: n for s, n in tally.counts.items() if n}, failures)
    there = (counts_of(rows["status"]), counts_of(failed["error_class"]))
    return None if told == there else f"its footer tells {told}, its rows are {there}"


def counts_of(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(v["values"]): v["counts"] for v in pc.value_counts(column).to_pylist()}
