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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.tablefiles import IDENTITY, Fault, counts_of, read_table
from pipeline.coverage import END, Ranges
from pipeline.footer import STATUSES
from pipeline.sources import open_source
from pipeline.sources.base import Question, Reading, Sample, Shard
from pipeline.sources.fetch import Unfetched
from pipeline.storage import Output
from schemas.ask import ROW_QUESTIONS
from schemas.errors import RowError
from schemas.job import JobSpec
from schemas.tables import answer_schema

EXAMPLES = 5

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
    table, staged, faults = read_table(
        output, schema=schema, versions={shard.uri: shard.identity for shard in shards}
    )
    samples = {u: job.samples(ask) for u, ask in zip(job.units, job.ask, strict=True)}
    missing, doubled, unexpected = Finding(), Finding(), Finding()
    inputs = 0
    wanted = END if job.source.limit is None else job.source.limit
    for shard, there in _by_shard(table, shards, unexpected=unexpected):
        most = _rows_to_read(wanted, there)
        reading = Reading(source.read(shard, skip=Ranges.starting(most)))
        for identity in _called_for(reading if most else (), samples=samples):
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
        counts={**dict.fromkeys(STATUSES, 0), **counts_of(table["status"])},
        failures=counts_of(failed["error_class"]),
        missing=missing,
        doubled=doubled,
        unexpected=unexpected,
        faults=faults,
        staged=staged,
    )


def _rows_to_read(wanted: int, there: Iterable[Identity]) -> int:
    """Up to the last row that is wanted or there."""
    return max([wanted, *(index + 1 for index, _, _, _ in there if index is not None)])


def _called_for(rows: Iterable[Sample], *, samples: Mapping[str, int]) -> Iterator[Identity]:
    for row in rows:
        for question_id, number in answer_ids(row, samples=samples):
            yield row.index, question_id, 0, number


def answer_ids(row: Sample, *, samples: Mapping[str, int]) -> list[tuple[str | None, int]]:
    """The question id and the sample number of each answer that a source row has to have; it has
    one at least. `samples`: how many answers a question of each unit has."""
    if row.error is not None:
        return [(None, 0)]
    ids: list[tuple[str | None, int]] = []
    for unit, count in samples.items():
        own = [unit] if unit != ROW_QUESTIONS else _own_ids(row.questions, taken=tuple(samples))
        ids += [(each, n) for each in own for n in range(1 if each is None else count)]
    return ids


def _own_ids(
    questions: Sequence[Question] | RowError | None, *, taken: Sequence[str]
) -> Sequence[str | None]:
    """One null where the row has no questions of its own, or none that can be told apart."""
    if isinstance(questions, RowError) or not questions:
        return [None]
    ids = [question.id for question in questions]
    return ids if len({*ids, *taken}) == len(ids) + len(taken) else [None]


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
