"""Proving that an answer table is whole: from the source and the table, not from the footers.

The source is read again and says which answers there have to be; nothing is decoded, and images
that rows only name are not fetched: each has its answers, failed ones where it is gone. The rows
under `answers/` say which there are, and every column of theirs is read. Footers are only checked
against the rows of their own part, and for the version of the source that they answer. Where
answers stand though their shard has changed or is gone (`source.on_change: keep`), footers alone
can say which there have to be.
Source shards and parts are gone through one at a time; of all parts together, identities alone are
held in memory.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.tablefiles import IDENTITY, Fault, counts_of, read_files, version_faults
from pipeline.coverage import END, Coverage, Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION, STATUSES
from pipeline.sources import open_source
from pipeline.sources.base import Question, Reading, Sample
from pipeline.sources.fetch import Unfetched
from pipeline.storage import Output
from pipeline.versions import Versions
from schemas.ask import ROW_QUESTIONS
from schemas.errors import RowError
from schemas.job import JobSpec
from schemas.tables import answer_schema

EXAMPLES = 5

Identity = tuple[int, str | None, int, int]
"""A row's identity within its shard: source_index, question_id, turn, sample_number."""
Asked = Mapping[str, tuple[int, int]]
"""How many turns and samples the questions of each unit have."""


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
    files that the next run has to fold.
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
    files = read_files(
        output, schema=answer_schema(source.keep_types(), prompts=job.output.prompts)
    )
    covered = Coverage(shard for part in files.covered.values() for shard in part)
    versions = Versions.of(shards, covered, on_change=job.source.on_change)
    compared = _Comparison(
        {
            unit: (job.turns(ask), job.samples(ask))
            for unit, ask in zip(job.units, job.ask, strict=True)
        }
    )
    wanted = END if job.source.limit is None else job.source.limit
    by_uri = {shard.uri: shard for shard in shards}
    for uri, there in _by_shard(files.rows, list(by_uri)):
        rows_total = None
        if kept := versions.kept.get(uri):
            compared.add_kept(kept, there)
            rows_total = kept.rows_total
        elif uri in by_uri:
            most = _rows_to_read(wanted, there)
            reading = Reading(source.read(by_uri[uri], skip=Ranges.starting(most)))
            compared.add(uri, there, reading if most else (), wanted=wanted)
            rows_total = most if reading.rows_total is None else reading.rows_total
        else:
            compared.add_strangers(uri, there)
        if uri in by_uri:
            wanted = max(wanted - (rows_total or 0), 0)
    failed = files.rows.filter(pc.equal(files.rows["status"], "failed"))
    return Report(
        inputs=compared.inputs,
        counts={**dict.fromkeys(STATUSES, 0), **counts_of(files.rows["status"])},
        failures=counts_of(failed["error_class"]),
        missing=compared.missing,
        doubled=compared.doubled,
        unexpected=compared.unexpected,
        faults=[*files.faults, *version_faults(files.covered, versions)],
        staged=files.staged,
    )


class _Comparison:
    """What is there against what has to be there, a shard at a time."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self.inputs = 0
        self.missing, self.doubled, self.unexpected = Finding(), Finding(), Finding()

    def add(
        self, uri: str, there: Counter[Identity], rows: Iterable[Sample], *, wanted: int
    ) -> None:
        """A shard of the source. `wanted`: so many of its rows have to be answered."""
        for identity in _called_for(rows, asked=self._asked):
            times = there.pop(identity, 0)
            # What a run without a limit, or with another one, has answered is an input, too.
            if times or identity[0] < wanted:
                self._add(uri, identity, times=times)
        self.add_strangers(uri, there)

    def add_kept(self, kept: ShardCoverage, there: Counter[Identity]) -> None:
        """A shard of which an earlier version was answered, which nobody can read any more."""
        for identity in _lacking(kept, there):
            self._add(kept.uri, identity, times=0)
        for identity, times in there.items():
            if kept.missing_units(identity[0], kept.units) == list(kept.units):
                self.unexpected.add(kept.uri, identity, times=times)
            else:
                self._add(kept.uri, identity, times=times)

    def add_strangers(self, uri: str, there: Counter[Identity]) -> None:
        for identity, times in there.items():
            self.unexpected.add(uri, identity, times=times)

    def _add(self, uri: str, identity: Identity, *, times: int) -> None:
        self.inputs += 1
        if times == 0:
            self.missing.add(uri, identity)
        if times > 1:
            self.doubled.add(uri, identity)


def _lacking(kept: ShardCoverage, there: Iterable[Identity]) -> Iterator[Identity]:
    """Answers that the footers tell of and no row is; of a row's own questions, and of the samples
    of one, each stands for all.

    A row without a question id stands for whatever its source row has no other answer to.
    """
    ids: dict[int, set[str | None]] = defaultdict(set)
    for index, question_id, _, _ in there:
        ids[index].add(question_id)
    for unit in kept.units.keys() - {NULL_QUESTION}:
        for index in itertools.chain.from_iterable(range(*p) for p in kept.units[unit].pairs):
            found = ids.get(index, set())
            own = found - kept.units.keys() if unit == ROW_QUESTIONS else found & {unit}
            if not own and None not in found:
                yield index, None if unit == ROW_QUESTIONS else unit, 0, 0


def _rows_to_read(wanted: int, there: Iterable[Identity]) -> int:
    """Up to the last row that is wanted or there."""
    return max([wanted, *(index + 1 for index, _, _, _ in there if index is not None)])


def _called_for(rows: Iterable[Sample], *, asked: Asked) -> Iterator[Identity]:
    for row in rows:
        for answer in answer_ids(row, asked=asked):
            yield row.index, *answer


def answer_ids(row: Sample, *, asked: Asked) -> list[tuple[str | None, int, int]]:
    """The question id, turn and sample number of each answer that a source row has to have; it has
    one at least."""
    if row.error is not None:
        return [(None, 0, 0)]
    ids: list[tuple[str | None, int, int]] = []
    for unit, (turns, samples) in asked.items():
        own = [unit] if unit != ROW_QUESTIONS else _own_ids(row.questions, taken=tuple(asked))
        for each in own:
            numbers = [(0, 0)] if each is None else itertools.product(range(turns), range(samples))
            ids += [(each, *number) for number in numbers]
    return ids


def _own_ids(
    questions: Sequence[Question] | RowError | None, *, taken: Sequence[str]
) -> Sequence[str | None]:
    """One null where the row has no questions of its own, or none that can be told apart."""
    if isinstance(questions, RowError) or not questions:
        return [None]
    ids = [question.id for question in questions]
    return ids if len({*ids, *taken}) == len(ids) + len(taken) else [None]


def _by_shard(table: pa.Table, uris: Sequence[str]) -> Iterator[tuple[str, Counter[Identity]]]:
    """The answers about each of these shards, in their order, then about any other one."""
    others = set(pc.unique(table["source_uri"]).to_pylist()) - set(uris)
    uris = [*uris, *sorted(others, key=str)]
    number = pc.index_in(table["source_uri"], value_set=pa.array(uris, pa.string()))
    table = table.select(list(IDENTITY)).append_column("shard", number).sort_by("shard")
    starts = np.searchsorted(table["shard"].to_numpy(), np.arange(len(uris) + 1))
    for uri, start, stop in zip(uris, starts[:-1], starts[1:], strict=True):
        yield uri, Counter(_identities(table.slice(start, stop - start)))


def _identities(table: pa.Table) -> Iterator[Identity]:
    return zip(*(table[name].to_pylist() for name in IDENTITY[1:]), strict=True)
