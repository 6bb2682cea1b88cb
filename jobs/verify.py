"""Proving that an answer table is whole: from the source and the table, not from the footers.

The source is read again and says which answers there have to be; nothing is decoded, and images
that rows only name are not fetched: each has its answers, failed ones where it is gone. The rows
under `answers/` say which there are, and every column of theirs is read. Footers are only checked
against the rows of their own part, and for the version of the source that they answer.
Source shards and parts are gone through one at a time; of all parts together, identities alone are
held in memory.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import END, Ranges
from pipeline.footer import STATUSES
from pipeline.parts import ANSWERS, STAGING, SUFFIX, PartInfo, open_part
from pipeline.sources import open_source
from pipeline.sources.base import Question, Reading, Sample, Shard
from pipeline.sources.fetch import Unfetched
from pipeline.storage import Output, store_errors
from schemas.errors import JobError, RowError, SpecError
from schemas.job import ROW_QUESTIONS, JobSpec
from schemas.tables import answer_schema

EXAMPLES = 5
IDENTITY = ("source_uri", "source_index", "question_id", "turn", "sample_number")
OUTCOME = ("status", "error_class")
ERROR = ("error_stage", "error_class", "error_message")

Identity = tuple[int, str | None, int, int]
"""A row's identity within its shard: source_index, question_id, turn, sample_number."""


@dataclass
class Finding:
    """How many answers have one thing wrong with them, and the first few."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, uri: str, identity: Identity, *, times: int = 1) -> None:
        self.count += times
        if len(self.examples) < EXAMPLES:
            self.examples.append(dict(zip(IDENTITY, (uri, *identity), strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "examples": self.examples}


@dataclass(frozen=True)
class Fault:
    """A file under `answers/` that is not as it should be."""

    file: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a table holds against what the source and the spec call for.

    `inputs`: answers that there have to be. `counts`: rows by status. `missing`: called for and not
    there; `doubled`: there more than once; `unexpected`: rows that nothing calls for. `staged`:
    files that were not folded yet.
    """

    inputs: int
    counts: Mapping[str, int]
    failures: Mapping[str, int]
    missing: Finding
    doubled: Finding
    unexpected: Finding
    faults: Sequence[Fault]
    staged: int

    @property
    def ok(self) -> bool:
        found = self.missing.count + self.doubled.count + self.unexpected.count
        whole = sum(self.counts.values()) == self.inputs
        return whole and not found and not self.faults and not self.staged

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "inputs": self.inputs,
            "counts": dict(self.counts),
            "failures": dict(self.failures),
            "missing": self.missing.to_json(),
            "doubled": self.doubled.to_json(),
            "unexpected": self.unexpected.to_json(),
            "faults": [{"file": fault.file, "reason": fault.reason} for fault in self.faults],
            "staged": self.staged,
        }


def verify(job: JobSpec) -> Report:
    """Compare the job's table with its source.

    Raises SpecError where either cannot be reached, StoreUnavailable where a store fails while the
    source is read.
    """
    source = open_source(job.source, fetcher=Unfetched(job.source))
    shards = [replace(shard, piece=(0, 1)) for shard in source.list() if shard.piece[0] == 0]
    output = Output(job.output.path, job.output.storage, retry_s=job.output.retry_s)
    schema = answer_schema(source.keep_types(), prompts=job.output.prompts)
    table, staged, faults = _read_output(
        output, schema=schema, versions={shard.uri: shard.identity for shard in shards}
    )
    missing, doubled, unexpected = Finding(), Finding(), Finding()
    inputs = 0
    wanted = END if job.source.limit is None else job.source.limit
    for shard, there in _by_shard(table, shards, unexpected=unexpected):
        most = _rows_to_read(wanted, there)
        reading = Reading(source.read(shard, skip=Ranges.starting(most)))
        for identity in _called_for(reading if most else (), units=job.units):
            times = there.pop(identity, 0)
            # What a run without a limit, or with another one, has answered is an input, too.
            if times or identity[0] < wanted:
                inputs += 1
                if times == 0:
                    missing.add(shard.uri, identity)
            if times > 1:
                doubled.add(shard.uri, identity)
        for identity, times in there.items():
            unexpected.add(shard.uri, identity, times=times)
        wanted = max(wanted - (most if reading.rows_total is None else reading.rows_total), 0)
    failed = table.filter(pc.equal(table["status"], "failed"))
    return Report(
        inputs=inputs,
        counts={**dict.fromkeys(STATUSES, 0), **_counts(table["status"])},
        failures=_counts(failed["error_class"]),
        missing=missing,
        doubled=doubled,
        unexpected=unexpected,
        faults=faults,
        staged=staged,
    )


def _rows_to_read(wanted: int, there: Iterable[Identity]) -> int:
    """Up to the last row that is wanted or there."""
    return max([wanted, *(index + 1 for index, _, _, _ in there if index is not None)])


def _called_for(samples: Iterable[Sample], *, units: Sequence[str]) -> Iterator[Identity]:
    for sample in samples:
        for question_id in question_ids(sample, units=units):
            yield sample.index, question_id, 0, 0


def question_ids(sample: Sample, *, units: Sequence[str]) -> list[str | None]:
    """The question id of each answer that a source row has to have; it has one at least."""
    if sample.error is not None:
        return [None]
    ids: list[str | None] = []
    for unit in units:
        ids += [unit] if unit != ROW_QUESTIONS else _own_ids(sample.questions, taken=units)
    return ids


def _own_ids(
    questions: Sequence[Question] | RowError | None, *, taken: Sequence[str]
) -> Sequence[str | None]:
    """One null where the row has no questions of its own, or none that can be told apart."""
    if isinstance(questions, RowError) or not questions:
        return [None]
    ids = [question.id for question in questions]
    return ids if len({*ids, *taken}) == len(ids) + len(taken) else [None]


def _read_output(
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
    there = (_counts(rows["status"]), _counts(failed["error_class"]))
    return None if told == there else f"its footer tells {told}, its rows are {there}"


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(v["values"]): v["counts"] for v in pc.value_counts(column).to_pylist()}


def _by_shard(
    table: pa.Table, shards: Sequence[Shard], *, unexpected: Finding
) -> Iterator[tuple[Shard, Counter[Identity]]]:
    """Each shard with the answers that are there; answers of no shard are unexpected."""
    uris = pa.array([shard.uri for shard in shards], pa.string())
    number = pc.fill_null(pc.index_in(table["source_uri"], value_set=uris), len(shards))
    table = table.select(list(IDENTITY)).append_column("shard", number).sort_by("shard")
    starts = np.searchsorted(table["shard"].to_numpy(), np.arange(len(shards) + 1))
    for shard, start, stop in zip(shards, starts[:-1], starts[1:], strict=True):
        yield shard, Counter(_identities(table.slice(start, stop - start)))
    strangers = table.slice(starts[-1])
    uris_there = strangers["source_uri"].to_pylist()
    for uri, identity in zip(uris_there, _identities(strangers), strict=True):
        unexpected.add(uri, identity)


def _identities(table: pa.Table) -> Iterator[Identity]:
    return zip(*(table[name].to_pylist() for name in IDENTITY[1:]), strict=True)
