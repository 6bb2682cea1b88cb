"""Folding: many staged parts into one, every source row's answers once. No files, no store.

Parts may overlap, because Ray repeats work with other batch borders: what an earlier part covers,
later ones lose. What is left to a part is its share. Of an answer row, the unit is its question id
where the part covers a unit of that name, NULL_QUESTION where the id is null, else `questions`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Coverage, Ranges, ShardCoverage, longest
from pipeline.footer import NULL_QUESTION, Footer, Tally
from pipeline.parts import tally_of
from schemas.ask import ROW_QUESTIONS

Part = tuple[pa.Table, Footer]
Shards = tuple[ShardCoverage, ...]


@dataclass(frozen=True)
class Share:
    """What one staged part adds to what is covered elsewhere."""

    name: str
    shards: Shards
    tally: Tally


def added_coverage(shards: Iterable[ShardCoverage], *, covered: Coverage) -> Shards:
    """What `shards` cover and `covered` does not; shards that add nothing are left out."""
    return telling(_added(shard, covered.of(shard.uri, shard.identity)) for shard in shards)


def rows_of(part: Part, shards: Shards) -> pa.Table:
    """The answer rows of the part that this coverage stands for."""
    table, footer = part
    if shards == footer.shards:
        return table
    asked = {unit for shard in footer.shards for unit in shard.units}
    units = {shard.uri: shard.units for shard in shards}

    def is_covered(uri: str, index: int, question_id: str | None) -> bool:
        unit = NULL_QUESTION if question_id is None else question_id
        ranges = units.get(uri, {}).get(unit if unit in asked else ROW_QUESTIONS)
        return ranges is not None and index in ranges

    places = (table[name].to_pylist() for name in ("source_uri", "source_index", "question_id"))
    return table.filter(pa.array(map(is_covered, *places), pa.bool_()))


def cut(part: Part, shards: Shards, *, most: int, is_first: bool) -> tuple[Shards, Shards]:
    """The part's share in two: its first source rows, of at most `most` answers, and the rest.

    The answers of one source row stay together: the first may be empty, but where `is_first` holds
    it has one source row, however many its answers.
    """
    places = rows_of(part, shards).select(["source_uri", "source_index"])
    places = places.sort_by([("source_uri", "ascending"), ("source_index", "ascending")])
    if places.num_rows <= most:
        return shards, ()
    place = _place(places, most)
    if is_first and place == _place(places, 0):
        place = (place[0], place[1] + 1)
    uri, index = place
    before = Ranges.of([(0, index)])
    head, tail = [], []
    for shard in shards:
        if shard.uri == uri:
            # Where the shard ends is told with its last rows.
            head.append(replace(shard, rows_total=None, units=_units(shard, lambda r: r & before)))
            tail.append(replace(shard, units=_units(shard, lambda r: r - before)))
        else:
            (head if shard.uri < uri else tail).append(shard)
    return telling(head), telling(tail)


def _place(places: pa.Table, number: int) -> tuple[str, int]:
    return places["source_uri"][number].as_py(), places["source_index"][number].as_py()


def fold_parts(parts: Sequence[Part], shares: Sequence[Shards]) -> Part:
    """One part of the shares of the given ones, in the order of source and question.

    Raises ValueError where there are no parts.
    """
    taken = Coverage(shard for shards in shares for shard in shards)
    fingerprint = reduce(lambda a, b: a | b, [footer.fingerprint for _, footer in parts])
    tables = [rows_of(part, shards) for part, shards in zip(parts, shares, strict=True)]
    answers = in_order(pa.concat_tables(tables), units=list(fingerprint.questions))
    footer = Footer(
        shards=tuple(taken),
        fingerprint=fingerprint,
        run_ids=tuple(sorted({run for _, footer in parts for run in footer.run_ids})),
        tally=tally_of(answers),
    )
    return answers, footer


def _added(shard: ShardCoverage, known: ShardCoverage) -> ShardCoverage:
    units = {unit: ranges - known.units.get(unit, Ranges()) for unit, ranges in shard.units.items()}
    # A row without a question id stands for its units: where all are answered, it adds nothing.
    null = units.pop(NULL_QUESTION, Ranges())
    units[NULL_QUESTION] = null & reduce(Ranges.__or__, units.values(), Ranges())
    return replace(
        shard,
        rows_total=None
        if longest(shard.rows_total, known.rows_total) == known.rows_total
        else shard.rows_total,
        units={unit: units[unit] for unit in shard.units if units[unit].pairs},
    )


def _units(shard: ShardCoverage, change: Callable[[Ranges], Ranges]) -> dict[str, Ranges]:
    changed = {unit: change(ranges) for unit, ranges in shard.units.items()}
    return {unit: ranges for unit, ranges in changed.items() if ranges.pairs}


def telling(shards: Iterable[ShardCoverage]) -> Shards:
    """Those that say anything."""
    return tuple(s for s in shards if s.units or s.rows_total is not None)


def in_order(answers: pa.Table, *, units: Sequence[str]) -> pa.Table:
    """By shard and row, then as asked; a stable sort: a row's own questions keep their order."""
    others = units.index(ROW_QUESTIONS) if ROW_QUESTIONS in units else len(units)
    asked = pc.index_in(answers["question_id"], value_set=pa.array(units, pa.string()))
    keys = pa.table(
        {
            "uri": answers["source_uri"],
            "index": answers["source_index"],
            "asked": pc.fill_null(asked, others),
        }
    )
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names])
    return answers.take(order).combine_chunks()
