"""The driver's side of the commit: what an output holds, and folding what workers have staged.

    write_part (workers)            AnswerTable (driver)
    staging/KEY.parquet   ------>   answers/part-KEY.parquet
    one part a batch                parts of about `rows_per_file`

A fold publishes first and removes from staging afterwards: killed in between, it leaves staged
parts that `answers/` covers, which the next run's fold removes. Whoever lists `answers/` sees every
row at most once. Leftovers in `.tmp` are of publications that never happened, and harmless.

One run per output is assumed here, not enforced. This module knows no ray.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Coverage, Ranges
from pipeline.fold import added_coverage, fold_parts
from pipeline.footer import Fingerprint, Footer, Tally
from pipeline.parts import (
    ANSWERS,
    STAGING,
    SUFFIX,
    PartInfo,
    part_bytes,
    read_columns,
    read_info,
    read_part,
)
from pipeline.sources.base import Shard
from pipeline.storage import Output
from schemas.errors import JobError, SpecError
from schemas.job import ROW_QUESTIONS, OutputSpec
from schemas.tables import answer_schema

READERS = 16
"""Parts that are read at the same time; they wait for the store, not for a CPU."""
PLACE = ("source_uri", "source_index", "question_id")


class AnswerTable:
    """The answers of one output, as its parts' footers tell them."""

    def __init__(
        self, spec: OutputSpec, *, keep: Mapping[str, pa.DataType], fingerprint: Fingerprint
    ) -> None:
        self.output = Output(spec.path, spec.storage)
        self._rows_per_file = spec.rows_per_file
        self._schema = answer_schema(keep, prompts=spec.prompts)
        self._fingerprint = fingerprint
        self._answers: dict[str, Footer] = {}
        self._staged: dict[str, Footer] = {}
        self._covered: list[str] = []
        self._folded = Coverage()
        self.coverage = Coverage()
        """What is answered, folded or staged; grows as parts are committed."""

    def open(self, shards: Sequence[Shard]) -> None:
        """Learn what the output holds. Changes nothing there.

        Raises SpecError where its answers cannot stand beside this run's: another fingerprint,
        other columns, a shard of the source that has changed, or a question added under an id
        that rows' own questions have; JobError for a damaged part.
        """
        for part in self._read_new(ANSWERS):
            self._answers[part.name] = part.footer
            _add_all(self._folded, part.footer)
            _add_all(self.coverage, part.footer)
        for part in self._read_new(STAGING):
            self._stage(part.name, part.footer)
        self._check_shards(shards)
        self._check_own_ids(shards)

    @property
    def tally(self) -> Tally:
        """What became of all rows so far. Exact after `finish`; until then, work that Ray has
        repeated with other batch borders is counted twice."""
        footers = [*self._answers.values(), *self._staged.values()]
        return reduce(add, (footer.tally for footer in footers), Tally())

    def commit(self, receipt: pa.Table) -> None:
        """Take note of parts that are staged and durable."""
        for row in receipt.to_pylist():
            self._stage(row["part"], Footer.from_bytes(row["footer"].encode(), name=row["part"]))

    def fold(self) -> None:
        """Fold staged parts while they fill a file."""
        while sum(footer.tally.rows for footer in self._staged.values()) >= self._rows_per_file:
            self._fold_some()

    def finish(self) -> None:
        """Fold everything that is staged, whoever staged it; leaves staging empty."""
        for part in self._read_new(STAGING):
            self._stage(part.name, part.footer)
        while self._staged:
            self._fold_some()
        self._remove_covered()

    def _stage(self, name: str, footer: Footer) -> None:
        if added_coverage(footer.shards, covered=self._folded):
            self._staged[name] = footer
            _add_all(self.coverage, footer)
        else:
            self._covered.append(name)

    def _fold_some(self) -> None:
        """Whole staged parts, oldest first, until they fill a file: publish, then remove."""
        names, rows = [], 0
        for name, footer in self._staged.items():
            names.append(name)
            rows += footer.tally.rows
            if rows >= self._rows_per_file:
                break
        parts = self._read_parts(names)
        answers, footer = fold_parts(parts, covered=self._folded)
        if footer.shards:
            self._publish(answers, footer)
        for name in names:
            del self._staged[name]
        self._covered += names
        self._remove_covered()

    def _publish(self, answers: pa.Table, footer: Footer) -> None:
        name = f"{ANSWERS}/part-{footer.key}{SUFFIX}"
        published = self.output.publish(name, part_bytes(answers, footer))
        # An upload that the client tried twice finds its own first try there.
        if not published and read_info(self.output, name).footer != footer:
            raise JobError(
                f"{self.output.uri}/{name} appeared while this run was at work: another run "
                "writes to this output; let it end, then run this one again"
            )
        self._answers[name] = footer
        _add_all(self._folded, footer)

    def _remove_covered(self) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self.output.remove, self._covered))
        self._covered = []

    def _read_parts(self, names: Sequence[str]) -> list[tuple[pa.Table, Footer]]:
        try:
            with ThreadPoolExecutor(READERS) as pool:
                return list(pool.map(lambda name: read_part(self.output, name), names))
        except FileNotFoundError as error:
            raise JobError(
                f"{self.output.uri}: a staged part is gone ({error}): another run writes to this "
                "output; let it end, then run this one again"
            ) from error

    def _read_new(self, folder: str) -> list[PartInfo]:
        """The parts of a folder that are not known yet, checked against this run."""
        known = {*self._answers, *self._staged, *self._covered}
        names = [n for n in self.output.names(folder, suffix=SUFFIX) if n not in known]
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda name: read_info(self.output, name), names))
        for part in parts:
            self._check_part(part)
        return parts

    def _check_part(self, part: PartInfo) -> None:
        place = f"{self.output.uri}/{part.name}"
        if differences := part.footer.fingerprint.differences(self._fingerprint):
            raise SpecError(
                f"{place} was answered otherwise: {'; '.join(differences)}. "
                "Give another output.path, or put the old value back"
            )
        if not part.schema.equals(self._schema):
            raise SpecError(
                f"{place} has other columns than this run would write: "
                f"{_schema_differences(part.schema, self._schema)}. Give another output.path, or "
                "put source.keep and output.prompts back"
            )

    def _check_shards(self, shards: Iterable[Shard]) -> None:
        answered = {shard.uri: shard.identity for shard in self.coverage}
        for shard in shards:
            if (old := answered.get(shard.uri, shard.identity)) != shard.identity:
                raise SpecError(
                    f"{shard.uri} has changed since it was answered in {self.output.uri}: it was "
                    f"{old!r}, is now {shard.identity!r}. Give another output.path"
                )

    def _check_own_ids(self, shards: Iterable[Shard]) -> None:
        """Two answers of one row under one id could not be told apart.

        Reads the ids of rows, and only where a question was added beside answered `questions`.
        """
        added = {shard.uri: units for shard in shards if (units := self._added_units(shard))}
        names = [
            name
            for name, footer in {**self._answers, **self._staged}.items()
            if any(s.uri in added and ROW_QUESTIONS in s.units for s in footer.shards)
        ]
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda name: self._refuse_own_ids(name, added=added), names))

    def _added_units(self, shard: Shard) -> dict[str, Ranges]:
        """By question id, the rows that lack its answer and have those to questions of their own.

        Where a row has both, its own ids were held against the question's when it was answered.
        """
        known = self.coverage.of(shard.uri, shard.identity).units
        if ROW_QUESTIONS not in known:
            return {}
        own = known[ROW_QUESTIONS]
        asked = [unit for unit in self._fingerprint.questions if known.get(unit) != own]
        lacking = {unit: own - known.get(unit, Ranges()) for unit in asked}
        return {unit: rows for unit, rows in lacking.items() if rows.pairs}

    def _refuse_own_ids(self, name: str, *, added: Mapping[str, Mapping[str, Ranges]]) -> None:
        ids = read_columns(self.output, name, PLACE)
        units = pa.array({unit for units in added.values() for unit in units}, pa.string())
        suspects = ids.filter(pc.is_in(ids["question_id"], value_set=units)).to_pylist()
        for row in suspects:
            uri, index, unit = (row[name] for name in PLACE)
            if index in added.get(uri, {}).get(unit, Ranges()):
                raise SpecError(
                    f"the id {unit!r} is already used by rows' own questions in {self.output.uri}; "
                    f"give the question another id. One of them is {uri} row {index}"
                )


def _add_all(coverage: Coverage, footer: Footer) -> None:
    for shard in footer.shards:
        coverage.add(shard)


def _schema_differences(old: pa.Schema, new: pa.Schema) -> str:
    was = {field.name: field.type for field in old}
    now = {field.name: field.type for field in new}
    # Arrow's equality, unlike the types' text, passes over the name that a list gives its items.
    changed = [n for n in {**was, **now} if n not in was or n not in now or was[n] != now[n]]
    lines = [f"{name}: was {was.get(name)}, is now {now.get(name)}" for name in changed]
    return "; ".join(lines) or f"their order: was {list(was)}, is now {list(now)}"


def write_run_record(output: Output, run_id: str, record: Mapping[str, Any]) -> None:
    """Write `runs/RUN_ID.json`; a later record of the same run takes the earlier one's place.

    At no moment is there none, or half of one.
    """
    data = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
    output.replace(f"runs/{run_id}.json", data)
