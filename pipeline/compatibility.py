"""What may stand beside what in one output: the reasons for which a run is refused.

Every refusal is a SpecError that names the old value, the new one and what to do. Nothing is
changed here, and rows are read only where a question was added beside rows' own.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coverage import Coverage, Ranges
from pipeline.footer import Fingerprint
from pipeline.parts import read_columns
from pipeline.sources.base import Shard
from pipeline.storage import READERS, Output
from pipeline.versions import Versions
from schemas.ask import ROW_QUESTIONS
from schemas.errors import SpecError

REMEDY = (
    "Run it with --fork NEW_DST, which starts another table with the answers that still hold, or "
    "with --force, which replaces this one part by part"
)
PLACE = ("source_uri", "source_index", "question_id")


def check_fingerprint(old: Fingerprint, new: Fingerprint, *, place: str) -> None:
    if differences := old.differences(new):
        raise SpecError(
            f"{place} was answered otherwise: {'; '.join(differences)}. "
            f"{REMEDY}, or put the old value back"
        )


def check_schema(old: pa.Schema, new: pa.Schema, *, place: str) -> None:
    if not old.equals(new):
        raise SpecError(
            f"{place} has other columns than this run would write: "
            f"{_schema_differences(old, new)}. {REMEDY}, or put source.keep and output.prompts back"
        )


def _schema_differences(old: pa.Schema, new: pa.Schema) -> str:
    was = {field.name: field.type for field in old}
    now = {field.name: field.type for field in new}
    # Arrow's equality, unlike the types' text, passes over the name that a list gives its items.
    changed = [n for n in {**was, **now} if n not in was or n not in now or was[n] != now[n]]
    lines = [f"{name}: was {was.get(name)}, is now {now.get(name)}" for name in changed]
    return "; ".join(lines) or f"their order: was {list(was)}, is now {list(now)}"


def check_source(versions: Versions, answered: Coverage, *, place: str) -> None:
    """Refuse to remove everything: that is another source, not one that has changed."""
    if versions.on_change == "replace" and versions.have_nothing_of(answered):
        raise SpecError(
            f"{place} has answers about {len(answered):,} shards, none of which is in source.path "
            f"any more; the first was {next(iter(answered)).uri}. Give another output.path, or set "
            "source.on_change to keep"
        )


Added = Mapping[str, Mapping[str, Ranges]]
"""By shard and question id, the rows that lack its answer and have those to their own questions."""


def added_questions(coverage: Coverage, shards: Iterable[Shard], *, units: Iterable[str]) -> Added:
    """Questions that come to rows whose own questions are answered already.

    Where a row has both, its own ids were held against the question's when it was answered.
    """
    asked = tuple(units)
    by_shard = {shard.uri: _added_to(coverage, shard, asked) for shard in shards}
    return {uri: units for uri, units in by_shard.items() if units}


def _added_to(coverage: Coverage, shard: Shard, asked: Iterable[str]) -> dict[str, Ranges]:
    known = coverage.of(shard.uri, shard.identity).units
    if ROW_QUESTIONS not in known:
        return {}
    own = known[ROW_QUESTIONS]
    lacking = {u: own - known.get(u, Ranges()) for u in asked if known.get(u) != own}
    return {unit: rows for unit, rows in lacking.items() if rows.pairs}


def check_own_ids(output: Output, names: Iterable[str], *, added: Added) -> None:
    """Two answers of one row under one id could not be told apart. `names`: parts to look into."""
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda name: _refuse_own_ids(output, name, added=added), names))


def _refuse_own_ids(output: Output, name: str, *, added: Added) -> None:
    ids = read_columns(output, name, PLACE)
    units = pa.array({unit for units in added.values() for unit in units}, pa.string())
    suspects = ids.filter(pc.is_in(ids["question_id"], value_set=units)).to_pylist()
    for row in suspects:
        uri, index, unit = (row[name] for name in PLACE)
        if index in added.get(uri, {}).get(unit, Ranges()):
            raise SpecError(
                f"the id {unit!r} is already used by rows' own questions in {output.uri}; "
                f"give the question another id. One of them is {uri} row {index}"
            )
