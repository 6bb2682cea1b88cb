"""What of a table still holds under another fingerprint: the start of a fork.

The model's side has to be the same, and of the questions those count whose fingerprint is. Where a
question has changed, source rows with an answer that stands for all their questions are left out
altogether: nobody can take such an answer apart. No files, no store.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pipeline.coverage import Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION, Fingerprint, Footer


def common(old: Fingerprint, new: Fingerprint) -> Fingerprint | None:
    """What both have; null where the model's side differs."""
    if old.model != new.model:
        return None
    same = {u: h for u, h in old.questions.items() if new.questions.get(u) == h}
    return Fingerprint(old.model, same)


def whole_rows(footers: Iterable[Footer]) -> dict[tuple[str, str], Ranges]:
    """By shard and version, the source rows with an answer that stands for several questions."""
    found: dict[tuple[str, str], Ranges] = {}
    for footer in footers:
        for shard in footer.shards:
            key = (shard.uri, shard.identity)
            nulls = shard.units.get(NULL_QUESTION, Ranges())
            found[key] = found.get(key, Ranges()) | nulls
    return found


def carried(
    footer: Footer, held: Fingerprint, *, whole: Mapping[tuple[str, str], Ranges]
) -> tuple[ShardCoverage, ...]:
    """What a part covers that still holds."""
    return tuple(_carried(s, held, whole[s.uri, s.identity]) for s in footer.shards)


def _carried(shard: ShardCoverage, held: Fingerprint, whole: Ranges) -> ShardCoverage:
    known = {*held.questions, NULL_QUESTION}
    units = {unit: ranges for unit, ranges in shard.units.items() if unit in known}
    return replace(shard, units={unit: ranges - whole for unit, ranges in units.items()})
