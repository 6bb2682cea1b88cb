"""The driver's side of the commit: what an output holds, and folding what workers have staged.

    write_part (workers)            AnswerTable (driver)
    staging/KEY.parquet   ------>   answers/part-KEY.parquet
    one part an interval            parts of `rows_per_file`

A fold is recorded as an intent, published, and only then removed from staging: killed in between,
it leaves what the next run finishes. Whoever lists `answers/` sees every row at most once.
Leftovers in `.tmp` are of publications that never happened, and harmless. Knows no ray.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from operator import add, or_
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.again import (
    Missing,
    each_place_once,
    failed_rows,
    missing_of,
    not_covered,
    places_of,
    swaps_of,
)
from pipeline.carry import carried, common, whole_rows
from pipeline.compatibility import (
    added_questions,
    check_fingerprint,
    check_own_ids,
    check_schema,
    check_source,
)
from pipeline.coverage import Coverage, Ranges
from pipeline.fold import Part, Shards, Share, added_coverage, cut, fold_parts, rows_of
from pipeline.footer import Fingerprint, Footer, Tally
from pipeline.force import Outdated
from pipeline.intents import Intent, Intents
from pipeline.ledger import Ledger
from pipeline.parts import (
    ANSWERS,
    STAGING,
    SUFFIX,
    PartInfo,
    part_bytes,
    read_info,
    read_part,
    tally_of,
)
from pipeline.revise import NO_ROWS, Revision
from pipeline.sources.base import Shard
from pipeline.storage import READERS, Output
from pipeline.versions import ALL_STAND, OnChange, Versions
from schemas.errors import JobError
from schemas.job import OutputSpec
from schemas.tables import answer_schema


class Holder(Protocol):
    """The lease under which a run writes (`lease.py`)."""

    number: int

    def check(self) -> None:
        """Raises OutputHeld once another run holds the output."""


class AnswerTable:
    """The answers of one output, as its parts' footers tell them.

    `open` reads; everything that writes wants `recover` before it.
    """

    def __init__(
        self, spec: OutputSpec, *, keep: Mapping[str, pa.DataType], fingerprint: Fingerprint
    ) -> None:
        self.output = Output(spec.path, spec.storage, retry_s=spec.retry_s)
        self._rows_per_file = spec.rows_per_file
        self._schema = answer_schema(keep, prompts=spec.prompts)
        self._fingerprint = fingerprint
        self._ledger = Ledger(self._schema)
        self._staged: dict[str, Share] = {}
        self._again: dict[str, Footer] = {}
        self._covered: set[str] = set()
        self._is_forced = False
        self._outdated: dict[str, Footer] = {}
        self._wanted: dict[str, Outdated] = {}
        self._reserved: dict[str, Share] = {}
        self.versions = ALL_STAND
        self.coverage = Coverage()
        """What is answered, folded or staged; grows as parts are committed."""
        self.swapped = 0
        """Failed rows that have given way to other answers."""

    def force(self) -> None:
        """From now on, what was answered otherwise is no reason to refuse: it is to be replaced."""
        self._is_forced = True

    def recover(self, lease: Holder) -> None:
        """Become the one that writes: finish what a run that is no more has left open.

        Raises as `open` does.
        """
        self._lease = lease
        self._intents = Intents(self.output, lease_number=lease.number)
        self.output.remove_leftovers()
        self._read_answers()
        for name, intent in self._intents.open().items():
            self._finish_fold(intent)
            self.output.remove(name)

    def open(self, shards: Sequence[Shard], *, on_change: OnChange = "replace") -> None:
        """Learn what the output holds of the source as it is. Changes nothing there.

        Raises SpecError where its answers cannot stand beside this run's: another fingerprint,
        other columns, no shard of the source, or a question added under an id that rows' own
        questions have; JobError for a damaged part.
        """
        self._read_answers()
        staged = self._read_staged_infos()
        answered = Coverage([*self.coverage, *(s for part in staged for s in part.footer.shards)])
        self.versions = Versions.of(shards, answered, on_change=on_change)
        self._wanted.clear()
        check_source(self.versions, answered, place=self.output.uri)
        self.coverage = Coverage(self.versions.standing(self.coverage))
        for part in staged:
            self._stage(part.name, part.footer, part.schema)
        units = self._fingerprint.questions
        if added := added_questions(self.coverage, shards, units=units):
            check_own_ids(self.output, [*self._ledger.names, *self._staged], added=added)

    def remove_stale(self) -> Tally:
        """Take out of the table what does not stand any more; the tally of what that was."""
        before = self._ledger.tally
        if all(map(self.versions.stand, self._ledger.coverage)):
            return Tally()
        revision = self._revision()
        revision.keep_only(self.versions.stand)
        self._ledger = Ledger.of(self._schema, revision.footers)
        return before - self._ledger.tally

    def failed(self, *, classes: Collection[str] = (), but_run: str = "") -> dict[str, Missing]:
        """What failed rows of these classes, or of all, would need to be answered again, by shard.

        Left out is what `but_run` has answered itself, and what is staged to take their place.
        """
        staged = Coverage(shard for footer in self._again.values() for shard in footer.shards)
        revision = self._revision()
        names = [name for name, f in revision.footers.items() if _has_failed(f.tally, classes)]

        def select(rows: pa.Table) -> pa.Table:
            failed = failed_rows(rows, classes=classes, but_run=but_run)
            return not_covered(failed, staged)

        failed = revision.rows_in(names, select)
        nulls = places_of(failed.filter(pc.is_null(failed["question_id"])))
        there = revision.rows_at(nulls, covered=self._ledger.coverage) if nulls else NO_ROWS
        units = tuple(self._fingerprint.questions)
        return missing_of(failed, there, covered=self._ledger.coverage, units=units)

    def replace_failed(self) -> None:
        """Put what is staged to take the place of failed rows there; whoever has staged it.

        Killed in between, it leaves the rest to the next run.
        """
        if not self._again:
            return
        parts = self._read_parts(self._again)
        standing = [self.versions.standing(footer.shards) for footer in self._again.values()]
        answers = each_place_once(map(rows_of, parts, standing))
        covered = Coverage(shard for shards in standing for shard in shards)
        new = Footer(
            shards=tuple(covered),
            fingerprint=reduce(or_, (footer.fingerprint for _, footer in parts)),
            run_ids=tuple({run for _, footer in parts for run in footer.run_ids}),
        )
        revision = self._revision()
        there = revision.rows_at(places_of(answers), covered=covered)
        swaps = swaps_of(there, answers, covered=covered)
        revision.swap(swaps, answers, new=new)
        self.swapped += sum(map(len, swaps.values()))
        self._ledger = Ledger.of(self._schema, revision.footers)
        shares = (share for s in self._staged.values() for share in s.shards)
        self.coverage = Coverage(self.versions.standing([*self._ledger.coverage, *shares]))
        again, self._again = self._again, {}
        for name, footer in again.items():
            # Rows that nobody has answered yet: a shard has turned out to be longer.
            self._stage(name, replace(footer, again=False))

    def take_over(self, other: Output) -> Tally:
        """Stage what another table holds that is not answered here and still holds; its tally.

        Each part of it is staged under a name made of what it covers: doing it twice, or killed in
        between and done again, does no harm. Raises JobError for a damaged part.
        """
        names = other.names(ANSWERS, suffix=SUFFIX)
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda name: read_info(other, name), names))
        held = {part.name: common(part.footer.fingerprint, self._fingerprint) for part in parts}
        is_same = all(
            fingerprint and fingerprint.questions == part.footer.fingerprint.questions
            for part, fingerprint in zip(parts, held.values(), strict=True)
        )
        whole = whole_rows(part.footer for part in parts)
        if is_same:
            whole = dict.fromkeys(whole, Ranges())
        before = self.tally
        for part in parts:
            if (fingerprint := held[part.name]) and part.schema.equals(self._schema):
                shards = self.versions.standing(carried(part.footer, fingerprint, whole=whole))
                self._take(other, part, added_coverage(shards, covered=self.coverage), fingerprint)
        return self.tally - before

    def _take(
        self, other: Output, part: PartInfo, shards: Shards, fingerprint: Fingerprint
    ) -> None:
        if not shards:
            return
        answers = rows_of(read_part(other, part.name), shards)
        footer = Footer(shards, fingerprint, part.footer.run_ids, tally_of(answers))
        name = f"{STAGING}/{footer.key}{SUFFIX}"
        self._lease.check()
        self.output.publish(name, part_bytes(answers, footer))
        self._stage(name, footer)

    def _to_replace(self) -> list[Outdated]:
        for name, footer in self._outdated.items():
            if name not in self._wanted:
                self._wanted[name] = Outdated.of(name, footer, self._fingerprint, self.versions)
        return [self._wanted[name] for name in self._outdated]

    def _replace_outdated(self) -> None:
        """Write the parts again whose rows are all answered anew."""
        if not self._outdated:
            return
        there = self.output.identities(ANSWERS, suffix=SUFFIX)
        revision = Revision(self.output, [], there=there, check=self._lease.check)
        for outdated in self._to_replace():
            reserved = Coverage(s for share in self._reserved.values() for s in share.shards)
            if outdated.is_covered(reserved, self.coverage):
                self._replace_part(outdated, revision)
        left = self._to_replace()
        for name, share in list(self._reserved.items()):
            if not share.shards:
                self._covered.add(name)
            elif not any(each.is_overlapping(share.shards) for each in left):
                self._staged[name] = share
            else:
                continue
            del self._reserved[name]
        self._remove_covered()

    def _replace_part(self, outdated: Outdated, revision: Revision) -> None:
        split = {name: outdated.split(share.shards) for name, share in self._reserved.items()}
        split = {name: (taken, rest) for name, (taken, rest) in split.items() if taken}
        parts = self._read_parts(split)
        answers, footer = self._schema.empty_table(), Footer((), self._fingerprint)
        if parts:
            answers, footer = fold_parts(parts, [taken for taken, _ in split.values()])
        revision.rewrite(outdated.name, answers, footer)
        del self._outdated[outdated.name]
        self._ledger.add(outdated.name, footer)
        for part, (name, (_, rest)) in zip(parts, split.items(), strict=True):
            self._reserved[name] = Share(name, rest, tally_of(rows_of(part, rest)))

    def _revision(self) -> Revision:
        there = self.output.identities(ANSWERS, suffix=SUFFIX)
        parts = self._read_infos(self._ledger.names)
        return Revision(self.output, parts, there=there, check=self._lease.check)

    @property
    def tally(self) -> Tally:
        """What became of all rows so far."""
        shares = itertools.chain(self._staged.values(), self._reserved.values())
        return reduce(add, (share.tally for share in shares), self._ledger.tally)

    def commit(self, receipt: pa.Table) -> None:
        """Take note of parts that are staged and durable."""
        for row in receipt.to_pylist():
            self._stage(row["part"], Footer.from_bytes(row["footer"].encode(), name=row["part"]))

    def fold(self) -> None:
        """Fold staged parts while they fill a file. Raises OutputHeld where the lease is lost."""
        if sum(footer.tally.rows for footer in self._again.values()) >= self._rows_per_file:
            self.replace_failed()
        self._replace_outdated()
        while sum(share.tally.rows for share in self._staged.values()) >= self._rows_per_file:
            self._fold_file()
        self._remove_covered()

    def finish(self) -> None:
        """Fold everything that is staged, whoever staged it; leaves staging empty."""
        self._read_staged()
        self.replace_failed()
        self._replace_outdated()
        while self._staged:
            self._fold_file()
        self.close()

    def close(self) -> None:
        """End here: what is staged waits for the next run."""
        self._remove_covered()
        self._write_ledger()

    def _read_answers(self) -> None:
        there = self.output.identities(ANSWERS, suffix=SUFFIX)
        is_new = not self._ledger.names and not self._is_forced
        if is_new and (ledger := Ledger.read(self.output, there=there)):
            self._check(ledger.fingerprint, ledger.schema, name=ANSWERS)
            self._ledger = ledger
            self.coverage.add_all(ledger.coverage)
        for part in self._read_infos(there.keys() - self._ledger.names - self._outdated.keys()):
            self._add_part(part.name, part.footer, part.schema)

    def _read_staged(self) -> None:
        for part in self._read_staged_infos():
            self._stage(part.name, part.footer, part.schema)

    def _read_staged_infos(self) -> list[PartInfo]:
        names = set(self.output.names(STAGING, suffix=SUFFIX))
        return self._read_infos(
            names - self._staged.keys() - self._again.keys() - self._reserved.keys() - self._covered
        )

    def _read_infos(self, names: set[str]) -> list[PartInfo]:
        with ThreadPoolExecutor(READERS) as pool:
            parts = list(pool.map(lambda name: read_info(self.output, name), sorted(names)))
        for part in parts:
            self._check(part.footer.fingerprint, part.schema, name=part.name)
        return parts

    def _check(self, fingerprint: Fingerprint, schema: pa.Schema, *, name: str) -> None:
        if self._is_forced:
            return
        place = f"{self.output.uri}/{name}"
        check_fingerprint(fingerprint, self._fingerprint, place=place)
        check_schema(schema, self._schema, place=place)

    def _is_outdated(self, footer: Footer, schema: pa.Schema) -> bool:
        is_other = bool(footer.fingerprint.differences(self._fingerprint))
        return self._is_forced and (is_other or not schema.equals(self._schema))

    def _add_part(self, name: str, footer: Footer, schema: pa.Schema) -> None:
        if self._is_outdated(footer, schema):
            self._outdated[name] = footer
            return
        self._ledger.add(name, footer)
        self.coverage.add_all(footer.shards)

    def _stage(self, name: str, footer: Footer, schema: pa.Schema | None = None) -> None:
        """Take a staged part's share: what nothing that is known covers already."""
        if name in self._staged or name in self._again or name in self._reserved:
            return
        if self._is_outdated(footer, self._schema if schema is None else schema):
            self._covered.add(name)
            return
        if footer.again:
            self._again[name] = footer
            return
        standing = self.versions.standing(footer.shards)
        shards = added_coverage(standing, covered=self.coverage)
        if not shards:
            self._covered.add(name)
            return
        tally = footer.tally
        if shards != footer.shards:
            (part,) = self._read_parts([name])
            tally = tally_of(rows_of(part, shards))
        to_come = any(each.is_overlapping(shards) for each in self._to_replace())
        (self._reserved if to_come else self._staged)[name] = Share(name, shards, tally)
        self.coverage.add_all(shards)

    def _fold_file(self) -> None:
        """Staged parts, oldest first, until a file is full: record, publish, remove."""
        parts, taken, left = self._next_fold()
        answers, footer = fold_parts(parts, list(taken.values()))
        name = part_name(footer)
        emptied = tuple(staged for staged in taken if staged not in left)
        intent = self._intents.record(Intent(name, taken, emptied))
        self._lease.check()
        self._publish(name, answers, footer)
        self._staged |= left
        for staged in emptied:
            del self._staged[staged]
        self._covered |= set(emptied)
        self._remove_covered()
        self.output.remove(intent)
        if self._ledger.is_behind:
            self._write_ledger()

    def _next_fold(self) -> tuple[list[Part], dict[str, Shards], dict[str, Share]]:
        """Parts that fill one file, what it takes of each, and what it leaves of the last."""
        names, rows = [], 0
        for share in self._staged.values():
            names.append(share.name)
            rows += share.tally.rows
            if rows >= self._rows_per_file:
                break
        parts = self._read_parts(names)
        taken = {name: self._staged[name].shards for name in names}
        last, left = self._staged[names[-1]], {}
        if (over := rows - self._rows_per_file) > 0:
            room = last.tally.rows - over
            head, tail = cut(parts[-1], last.shards, most=room, is_first=len(names) == 1)
            if tail:
                tally = tally_of(rows_of(parts[-1], tail))
                left[last.name] = Share(last.name, tail, tally)
            taken[last.name] = head
            if not head:
                del taken[last.name], parts[-1]
        return parts, taken, left

    def _finish_fold(self, intent: Intent) -> None:
        """Do what a run that is no more, or has lost its lease, was about to do.

        What a run recorded after it had lost its lease is no work: it never published that, and
        the parts may have been folded otherwise since.
        """
        if not self._is_known(intent.part):
            parts = self._read_if_there(intent.staged)
            # The run may be at it still, and just be done.
            self._read_answers()
        if not self._is_known(intent.part):
            if parts is None or self._ledger.coverage.overlaps(intent.shards):
                return
            answers, footer = fold_parts(parts, list(intent.staged.values()))
            self._check(footer.fingerprint, answers.schema, name=intent.part)
            self._publish(intent.part, answers, footer)
        self._covered |= set(intent.emptied)
        self._remove_covered()

    def _is_known(self, name: str) -> bool:
        return name in self._ledger.names or name in self._outdated

    def _publish(self, name: str, answers: pa.Table, footer: Footer) -> None:
        if not self.output.publish(name, part_bytes(answers, footer)):
            # The first try of an upload that was tried again, or a run that finished this fold.
            footer = read_info(self.output, name).footer
            if name != part_name(footer):
                self._lease.check()
                raise JobError(
                    f"{self.output.uri}/{name} is there and covers something else; move it away "
                    "and run the job again: what it held is answered again"
                )
        self._add_part(name, footer, answers.schema)

    def _write_ledger(self) -> None:
        if self._outdated:
            return
        self._ledger.write(self.output, there=self.output.identities(ANSWERS, suffix=SUFFIX))

    def _remove_covered(self) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(self.output.remove, self._covered))
        self._covered.clear()

    def _read_parts(self, names: Iterable[str]) -> list[Part]:
        try:
            with ThreadPoolExecutor(READERS) as pool:
                return list(pool.map(lambda name: read_part(self.output, name), names))
        except FileNotFoundError as error:
            self._lease.check()
            raise JobError(
                f"{self.output.uri}: a staged part is gone ({error}); run the job again: what it "
                "held is answered again"
            ) from error

    def _read_if_there(self, names: Iterable[str]) -> list[Part] | None:
        try:
            return [read_part(self.output, name) for name in names]
        except FileNotFoundError:
            return None


def _has_failed(tally: Tally, classes: Collection[str]) -> bool:
    return bool(tally.failures.keys() & set(classes) if classes else tally.counts["failed"])


def part_name(footer: Footer) -> str:
    """Where a part of the table is published: by what it covers."""
    return f"{ANSWERS}/part-{footer.key}{SUFFIX}"


def write_run_record(output: Output, run_id: str, record: Mapping[str, Any]) -> None:
    """Write `runs/RUN_ID.json`; a later record of the same run takes the earlier one's place.

    At no moment is there none, or half of one.
    """
    data = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
    output.replace(f"runs/{run_id}.json", data)
