"""Proving that an answer table is whole: from the source and the table, not from the footers.

The source is read again (nothing is decoded) and says which answers there have to be; the rows
under `answers/` say which there are. Footers are only checked against the rows of their own part.
Source shards are gone through one at a time; of the table, identities alone are held in memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.coverage import Ranges
from pipeline.footer import STATUSES
from pipeline.parts import ANSWERS, STAGING, SUFFIX, PartInfo, read_info
from pipeline.sources import open_source
from pipeline.sources.base import Question, Sample, Shard, Source
from pipeline.storage import Output
from schemas.errors import JobError, RowError
from schemas.job import ROW_QUESTIONS, JobSpec
from schemas.tables import answer_schema

EXAMPLES = 5
IDENTITY = ("source_uri", "source_index", "question_id", "turn", "sample_number")
OUTCOME = ("status", "error_class")

Answer = tuple[int, str | None, int, int]
"""A row's identity within its shard: source_index, question_id, turn, sample_number."""


@dataclass
class Finding:
    """How many answers have one thing wrong with them, and the first few."""

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, uri: str, answer: Answer, *, times: int = 1) -> None:
        self.count += times
        if len(self.examples) < EXAMPLES:
            self.examples.append(dict(zip(IDENTITY, (uri, *answer), strict=True)))

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
    """Compare the job's table with its source. Raises SpecError where either cannot be reached."""
    source = open_source(job.source)
    shards = source.list()
    output = Output(job.output.path, job.output.storage)
    schema = answer_schema(source.keep_types(), prompts=job.output.prompts)
    table, faults = _read_answers(output, schema=schema)
    missing, doubled, unexpected = Finding(), Finding(), Finding()
    inputs = 0
    for shard, there in _by_shard(table, shards, unexpected=unexpected):
        for answer in _called_for(source, shard, job=job):
            inputs += 1
            times = there.pop(answer, 0)
            if times == 0:
                missing.add(shard.uri, answer)
            elif times > 1:
                doubled.add(shard.uri, answer)
        for answer, times in there.items():
            unexpected.add(shard.uri, answer, times=times)
    failed = table.filter(pc.equal(table["status"], "failed"))
    return Report(
        inputs=inputs,
        counts={**dict.fromkeys(STATUSES, 0), **_counts(table["status"])},
        failures=_counts(failed["error_class"]),
        missing=missing,
        doubled=doubled,
        unexpected=unexpected,
        faults=faults,
        staged=len(output.names(STAGING, suffix="")),
    )


def _called_for(source: Source, shard: Shard, *, job: JobSpec) -> Iterator[Answer]:
    for sample in source.read(shard, skip=Ranges()):
        for question_id in question_ids(sample, units=job.units):
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


def _read_answers(output: Output, *, schema: pa.Schema) -> tuple[pa.Table, list[Fault]]:
    """Identity and outcome of every row of every whole part, and what is wrong with the files."""
    wanted = pa.schema([schema.field(name) for name in (*IDENTITY, *OUTCOME)])
    tables, faults = [wanted.empty_table()], []
    for name in output.names(ANSWERS, suffix=""):
        try:
            info = _read_info(output, name, schema=schema)
            rows = _read_rows(output, name)
        except JobError as error:
            faults.append(Fault(name, str(error)))
            continue
        tables.append(rows)
        if reason := _footer_fault(info, rows=rows):
            faults.append(Fault(name, reason))
    return pa.concat_tables(tables), faults


def _read_info(output: Output, name: str, *, schema: pa.Schema) -> PartInfo:
    """Raises JobError for what is not a whole part with the columns of the answer table."""
    if not name.endswith(SUFFIX):
        raise JobError(f"{output.uri}/{name}: is no {SUFFIX} file; move it away")
    info = read_info(output, name)
    if not info.schema.equals(schema):
        raise JobError(
            f"{output.uri}/{name}: its columns are {info.schema.names} instead of {schema.names}, "
            "or have other types"
        )
    return info


def _read_rows(output: Output, name: str) -> pa.Table:
    try:
        with output.open(name) as file:
            rows = pq.read_table(file, columns=[*IDENTITY, *OUTCOME])
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{output.uri}/{name}: cannot be read: {error}") from error
    return rows.replace_schema_metadata(None)


def _footer_fault(info: PartInfo, *, rows: pa.Table) -> str | None:
    tally = info.footer.tally
    failed = rows.filter(pc.equal(rows["status"], "failed"))
    failures = {error: found.count for error, found in tally.failures.items()}
    told = ({s: n for s, n in tally.counts.items() if n}, failures)
    there = (_counts(rows["status"]), _counts(failed["error_class"]))
    return None if told == there else f"its footer tells {told}, its rows are {there}"


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(v["values"]): v["counts"] for v in pc.value_counts(column).to_pylist()}


def _by_shard(
    table: pa.Table, shards: Sequence[Shard], *, unexpected: Finding
) -> Iterator[tuple[Shard, Counter[Answer]]]:
    """Each shard with the answers that are there; answers of no shard are unexpected."""
    uris = pa.array([shard.uri for shard in shards], pa.string())
    number = pc.fill_null(pc.index_in(table["source_uri"], value_set=uris), len(shards))
    table = table.select(list(IDENTITY)).append_column("shard", number).sort_by("shard")
    starts = np.searchsorted(table["shard"].to_numpy(), np.arange(len(shards) + 1))
    for shard, start, stop in zip(shards, starts[:-1], starts[1:], strict=True):
        yield shard, Counter(_answers(table.slice(start, stop - start)))
    strangers = table.slice(starts[-1])
    for uri, answer in zip(strangers["source_uri"].to_pylist(), _answers(strangers), strict=True):
        unexpected.add(uri, answer)


def _answers(table: pa.Table) -> Iterator[Answer]:
    return zip(*(table[name].to_pylist() for name in IDENTITY[1:]), strict=True)
