"""Failed rows that are answered again: which they are, and what takes the place of each.

A retry stages its answers like any run, in parts whose footers say `again`. Of a source row, each
failed answer gives way to the new one to the same question; one that stood for all questions of
its row gives way to whatever came instead. What failed is known by its status, and what has taken
its place already by its run: doing it twice does nothing. No files, no store.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import END, Coverage, Ranges, ShardCoverage
from pipeline.fold import Part, in_order
from pipeline.footer import NULL_QUESTION, Footer
from pipeline.parts import tally_of
from schemas.ask import ROW_QUESTIONS
from schemas.errors import ShardUnreadable
from schemas.tables import EARLIER_FAILED

PLACE = ("source_uri", "source_index")
ANSWER = ("question_id", "turn", "sample_number")
IDENTITY = (*PLACE, *ANSWER)
OUTCOME = (*ANSWER, "status", "error_class", "run_id", "attempts")
PART = "part"
ERROR = ("error_stage", "error_class", "error_message")
MOST_ATTEMPTS = 2**15 - 1

Place = tuple[str, int]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Swap:
    """One failed row, and the numbers of the new answers that take its place.

    `is_reason`: what came instead stands for the whole source row, which could not be read: the
    failed row stays, with that as its reason.
    """

    place: Place
    question_id: str | None
    turn: int
    sample_number: int
    attempts: int
    answers: tuple[int, ...]
    is_reason: bool
    ends_shard: bool
    """The shard broke off here, and does not any more: nobody knows how many rows it has."""

    @property
    def identity(self) -> tuple[str, int, str | None, int, int]:
        """Its IDENTITY."""
        return *self.place, self.question_id, self.turn, self.sample_number


def each_place_once(tables: Iterable[pa.Table]) -> pa.Table:
    """All rows, but a source row's of the first table that has any: Ray may repeat work."""
    seen: set[Place] = set()
    taken = []
    for table in tables:
        places = _places(table)
        taken.append(table.filter(pa.array([place not in seen for place in places], pa.bool_())))
        seen.update(places)
    return pa.concat_tables(taken)


def at_places(rows: pa.Table, places: Collection[Place]) -> pa.Table:
    return rows.filter(pa.array([place in places for place in _places(rows)], pa.bool_()))


def places_of(rows: pa.Table) -> dict[Place, None]:
    return dict.fromkeys(_places(rows))


def not_covered(rows: pa.Table, covered: Coverage) -> pa.Table:
    """Those at places of which nothing is covered."""
    units: dict[str, Ranges] = defaultdict(Ranges)
    for shard in covered:
        units[shard.uri] = reduce(or_, shard.units.values(), units[shard.uri])
    left = [index not in units[uri] for uri, index in _places(rows)]
    return rows.filter(pa.array(left, pa.bool_()))


def _places(rows: pa.Table) -> list[Place]:
    return list(zip(*(rows[name].to_pylist() for name in PLACE), strict=True))


def swaps_of(there: pa.Table, answers: pa.Table, *, covered: Coverage) -> dict[str, list[Swap]]:
    """What has to be done in each part. `there`: PLACE, OUTCOME and PART of the rows at the places
    of the new answers; `covered`: the units of those.
    """
    new: dict[Place, list[tuple[int, Row]]] = defaultdict(list)
    for number, row in enumerate(answers.select([*PLACE, *OUTCOME]).to_pylist()):
        new[row["source_uri"], row["source_index"]].append((number, row))
    old: dict[Place, list[Row]] = defaultdict(list)
    for row in there.to_pylist():
        old[row["source_uri"], row["source_index"]].append(row)
    units = {shard.uri: shard.units for shard in covered}
    swaps: dict[str, list[Swap]] = defaultdict(list)
    for place, came in new.items():
        asked = {u for u, ranges in units.get(place[0], {}).items() if place[1] in ranges}
        for row in old[place]:
            if not _is_failure(row) or row["run_id"] == came[0][1]["run_id"]:
                continue
            if swap := _swap(row, came, beside=old[place], units=asked):
                swaps[row[PART]].append(swap)
    return swaps


def _swap(
    row: Row, came: Sequence[tuple[int, Row]], *, beside: Iterable[Row], units: Collection[str]
) -> Swap | None:
    question_id = row["question_id"]
    reason = [n for n, new in came if new["question_id"] is None and new["status"] == "failed"]
    same = [n for n, new in came if _answer_of(new) == _answer_of(row)]
    is_reason = False
    if question_id is None:
        others = {each["question_id"] for each in beside} - {None}
        same = [n for n, new in came if new["question_id"] not in others]
    elif not same and _is_asked(question_id, units):
        same, is_reason = reason[:1], True
    if not same:
        return None
    classes = {new["error_class"] for n, new in came if n in same}
    broke_off = question_id is None and row["error_class"] == ShardUnreadable.__name__
    return Swap(
        place=(row["source_uri"], row["source_index"]),
        question_id=question_id,
        turn=row["turn"],
        sample_number=row["sample_number"],
        attempts=min(row["attempts"] + 1, MOST_ATTEMPTS),
        answers=tuple(same),
        is_reason=is_reason,
        ends_shard=broke_off and ShardUnreadable.__name__ not in classes,
    )


def _answer_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ANSWER)


def _is_failure(row: Row) -> bool:
    """One that was skipped for an answer that had failed has failed with it."""
    return bool(row["status"] == "failed" or row["error_class"] == EARLIER_FAILED)


def _is_asked(question_id: str, units: Collection[str]) -> bool:
    """A row's own question, where no unit is called so."""
    return question_id in units or ROW_QUESTIONS in units


def swapped(part: Part, swaps: Sequence[Swap], answers: pa.Table, *, new: Footer) -> Part:
    """The part with new answers in the place of failed rows. `new`: what is staged, as a whole."""
    table, footer = part
    gone = {swap.identity for swap in swaps}
    keys = zip(*(table[name].to_pylist() for name in IDENTITY), strict=True)
    numbers = {key: number for number, key in enumerate(keys) if key in gone}
    # One that is gone: another run is at work, as whoever writes this part will notice.
    swaps = [swap for swap in swaps if swap.identity in numbers]
    left = sorted(set(range(len(table))) - set(numbers.values()))
    came = [_came(swap, answers, table, numbers=numbers) for swap in swaps]
    at = [numbers[s.identity] for s, c in zip(swaps, came, strict=True) for _ in range(len(c))]
    fingerprint = footer.fingerprint | new.fingerprint
    rows = pa.concat_tables([table.take(pa.array(left, pa.int64())), *came])
    # Where the old row was: a row's own questions keep their order.
    rows = rows.take(sorted(range(len(rows)), key=[*left, *at].__getitem__))
    rows = in_order(rows, units=list(fingerprint.questions))
    return rows, Footer(
        shards=tuple(_covering(shard, swaps, answers, new=new) for shard in footer.shards),
        fingerprint=fingerprint,
        run_ids=tuple(sorted({*footer.run_ids, *new.run_ids})),
        tally=tally_of(rows),
    )


def _came(
    swap: Swap, answers: pa.Table, table: pa.Table, *, numbers: Mapping[tuple[Any, ...], int]
) -> pa.Table:
    rows = answers.take(list(swap.answers))
    if swap.is_reason:
        old = table.slice(numbers[swap.identity], 1)
        for name in (*ERROR, "run_id", "answered_at"):
            old = _with(old, name, rows[name].combine_chunks())
        rows = old
    attempts = pa.array([swap.attempts] * len(rows), rows.schema.field("attempts").type)
    return _with(rows, "attempts", attempts)


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)


def _covering(
    shard: ShardCoverage, swaps: Iterable[Swap], answers: pa.Table, *, new: Footer
) -> ShardCoverage:
    """What the part covers of the shard then; the same where it has no swap."""
    swapped = [swap for swap in swaps if swap.place[0] == shard.uri]
    indexes = Ranges.of_indexes(swap.place[1] for swap in swapped)
    units = dict(shard.units)
    for known in new.shards:
        if (known.uri, known.identity) == (shard.uri, shard.identity):
            for unit, ranges in known.units.items():
                units[unit] = units.get(unit, Ranges()) | (ranges & indexes)
    nulls = [swap for swap in swapped if swap.question_id is None]
    still = [swap for swap in nulls if _has_null(answers.take(list(swap.answers)))]
    left = shard.units.get(NULL_QUESTION, Ranges()) - _indexes(nulls) | _indexes(still)
    units[NULL_QUESTION] = left
    is_open = any(s.ends_shard and s.place[1] + 1 == shard.rows_total for s in swapped)
    return replace(
        shard,
        rows_total=None if is_open else shard.rows_total,
        units={unit: ranges for unit, ranges in units.items() if ranges.pairs},
    )


def _has_null(rows: pa.Table) -> bool:
    return bool(rows["question_id"].null_count)


def _indexes(swaps: Iterable[Swap]) -> Ranges:
    return Ranges.of_indexes(swap.place[1] for swap in swaps)


def failed_rows(rows: pa.Table, *, classes: Collection[str], but_run: str) -> pa.Table:
    """Those of these classes (of all, where there are none), which this run has not answered, and
    what was skipped in rows for their sake."""
    is_old = pc.not_equal(rows["run_id"], but_run)
    wanted = pc.and_(pc.equal(rows["status"], "failed"), is_old)
    if classes:
        named = pc.is_in(rows["error_class"], value_set=pa.array(sorted(classes), pa.string()))
        wanted = pc.and_(wanted, named)
    failed = rows.filter(wanted)
    skipped = rows.filter(pc.and_(pc.equal(rows["error_class"], EARLIER_FAILED), is_old))
    return pa.concat_tables([failed, at_places(skipped, places_of(failed))])


@dataclass(frozen=True)
class Missing:
    """What of a shard is to be answered again, as if it had not been; and nothing else.

    `own`: of the rows that are asked some of their own questions only, the ids of those. `end`:
    from here on all rows are missing, END where none is.
    """

    done: ShardCoverage
    own: Mapping[int, frozenset[str]]
    end: int

    def asks(self, units: Collection[str]) -> bool:
        every = Ranges.of([(0, self.end)])
        return self.end < END or any(self.done.units.get(u, every) != every for u in units)

    def only(self, units: Collection[str]) -> "Missing":
        """Without questions that are no more, and none to any that has not been asked yet."""
        every = Ranges.of([(0, self.end)])
        asked = {unit: self.done.units.get(unit, every) for unit in units}
        return replace(self, done=replace(self.done, units=asked))


def missing_of(
    failed: pa.Table, there: pa.Table, *, covered: Coverage, units: Collection[str]
) -> dict[str, Missing]:
    """By shard, what these failed rows are answers to, as far as it is asked in these `units`.

    `there`: all rows at the places of those that stand for all questions of their source row;
    `covered`: of the whole table.
    """
    asked: dict[Place, set[str]] = defaultdict(set)
    for row in there.to_pylist():
        asked[row["source_uri"], row["source_index"]].add(row["question_id"] or NULL_QUESTION)
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in failed.to_pylist():
        by_shard[row["source_uri"]].append(row)
    known = {shard.uri: shard for shard in covered if shard.uri in by_shard}
    found = {uri: _missing_of(known[uri], rows, asked) for uri, rows in by_shard.items()}
    return {uri: missing.only(units) for uri, missing in found.items() if missing.asks(units)}


def _missing_of(
    known: ShardCoverage, failed: Iterable[Row], asked: Mapping[Place, AbstractSet[str]]
) -> Missing:
    indexes: dict[str, list[int]] = defaultdict(list)
    own: dict[int, set[str]] = defaultdict(set)
    whole: set[int] = set()
    end = END
    for row in failed:
        index, question_id = row["source_index"], row["question_id"]
        if question_id is None:
            for unit in _units_without_answer(known, index, asked[known.uri, index]):
                indexes[unit].append(index)
            whole.add(index)
            if row["error_class"] == ShardUnreadable.__name__ and index + 1 == known.rows_total:
                end = index
        elif question_id in known.units:
            indexes[question_id].append(index)
        else:
            indexes[ROW_QUESTIONS].append(index)
            own[index].add(question_id)
    every = Ranges.of([(0, end)])
    units = {u: every - Ranges.of_indexes(indexes[u]) for u in known.units if u != NULL_QUESTION}
    return Missing(
        done=ShardCoverage(known.uri, known.identity, None, units),
        own={index: frozenset(ids) for index, ids in own.items() if index not in whole},
        end=end,
    )


def _units_without_answer(
    known: ShardCoverage, index: int, asked: AbstractSet[str]
) -> Iterator[str]:
    """The units that a row without a question id stands for."""
    for unit, ranges in known.units.items():
        has_own = bool(asked - known.units.keys() - {NULL_QUESTION})
        is_answered = has_own if unit == ROW_QUESTIONS else unit in asked
        if unit != NULL_QUESTION and index in ranges and not is_answered:
            yield unit
