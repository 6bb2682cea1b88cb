"""Folding: many small parts into one, every source row's answers once. No files, no store.

Parts may overlap, because Ray repeats work with other batch borders: what an earlier part covers,
later ones lose. Of an answer row, the unit is its question id where the part covers a unit of that
name, NULL_QUESTION where the id is null, else `questions`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Coverage, Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION, Footer
from pipeline.parts import tally_of
from schemas.job import ROW_QUESTIONS

Part = tuple[pa.Table, Footer]


def fold_parts(parts: Sequence[Part], *, covered: Coverage) -> Part:
    """One part of what the given ones add to `covered`, in the order of source and question.

    Raises ValueError where there are no parts.
    """
    touched = [shard for _, footer in parts for shard in footer.shards]
    known = Coverage(covered.of(shard.uri, shard.identity) for shard in touched)
    added = Coverage()
    tables = []
    for table, footer in parts:
        new = added_coverage(footer.shards, covered=known)
        tables.append(table if new == footer.shards else _rows_of((table, footer), new))
        for shard in new:
            known.add(shard)
            added.add(shard)
    fingerprint = reduce(lambda a, b: a | b, [footer.fingerprint for _, footer in parts])
    answers = _sorted(pa.concat_tables(tables), units=list(fingerprint.questions))
    footer = Footer(
        shards=tuple(added),
        fingerprint=fingerprint,
        run_ids=tuple(sorted({run for _, footer in parts for run in footer.run_ids})),
        tally=tally_of(answers),
    )
    return answers, footer


def added_coverage(
    shards: Iterable[ShardCoverage], *, covered: Coverage
) -> tuple[ShardCoverage, ...]:
    """What `shards` cover and `covered` does not; shards that add nothing are left out."""
    added = (_added(shard, covered.of(shard.uri, shard.identity)) for shard in shards)
    return tuple(s for s in added if s.units or s.rows_total is not None)


def _added(shard: ShardCoverage, known: ShardCoverage) -> ShardCoverage:
    units = {unit: ranges - known.units.get(unit, Ranges()) for unit, ranges in shard.units.items()}
    # A row without a question id stands for its units: where all are answered, it adds nothing.
    null = units.pop(NULL_QUESTION, Ranges())
    units[NULL_QUESTION] = null & reduce(Ranges.__or__, units.values(), Ranges())
    return replace(
        shard,
        rows_total=shard.rows_total if known.rows_total is None else None,
        units={unit: units[unit] for unit in shard.units if units[unit].pairs},
    )


def _rows_of(part: Part, added: Sequence[ShardCoverage]) -> pa.Table:
    """The answer rows of the part that the added coverage stands for."""
    table, footer = part
    asked = {unit for shard in footer.shards for unit in shard.units}
    units = {shard.uri: shard.units for shard in added}

    def is_added(uri: str, index: int, question_id: str | None) -> bool:
        unit = NULL_QUESTION if question_id is None else question_id
        ranges = units.get(uri, {}).get(unit if unit in asked else ROW_QUESTIONS)
        return ranges is not None and index in ranges

    places = (table[name].to_pylist() for name in ("source_uri", "source_index", "question_id"))
    return table.filter(pa.array(map(is_added, *places), pa.bool_()))


def _sorted(answers: pa.Table, *, units: Sequence[str]) -> pa.Table:
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
