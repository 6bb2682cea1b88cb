"""Replacing a table part by part, where something that decides its answers has changed.

A part that was answered otherwise is outdated as a whole. Its rows stay until all that takes their
place is staged; then it is written again under its name, in one step. So every part has one
fingerprint, and a reader finds every answer, old or new. No files, no store.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from pipeline.coverage import Coverage, Ranges, ShardCoverage
from pipeline.fold import Shards, telling
from pipeline.footer import NULL_QUESTION, Fingerprint, Footer
from pipeline.versions import Versions


@dataclass(frozen=True)
class Outdated:
    """A part that was answered otherwise, and what of it can and has to be answered anew."""

    name: str
    wanted: Shards

    @classmethod
    def of(cls, name: str, footer: Footer, new: Fingerprint, versions: Versions) -> "Outdated":
        """What is no longer asked, or about shards that are not what they were, just leaves."""
        known = (s for s in footer.shards if versions.current.get(s.uri) == s.identity)
        wanted = (_asked(shard, new) for shard in known)
        return cls(name, tuple(shard for shard in wanted if shard.units))

    def is_overlapping(self, shards: Shards) -> bool:
        """Whether any of this goes into the part: answers, or where a shard ends that it told."""
        ends = {(s.uri, s.identity) for s in self.wanted if s.rows_total is not None}
        tells_end = any(s.rows_total is not None and (s.uri, s.identity) in ends for s in shards)
        return tells_end or Coverage(self.wanted).overlaps(shards)

    def is_covered(self, there: Coverage, known: Coverage) -> bool:
        """Whether `there` has all of its answers, and it is `known` where shards end that it told.

        Else the end of a shard would come last, into a part of its own without rows.
        """
        ends = (s for s in self.wanted if s.rows_total is not None)
        has_ends = all(known.of(s.uri, s.identity).rows_total is not None for s in ends)
        return has_ends and not any(
            (ranges - there.of(shard.uri, shard.identity).units.get(unit, Ranges())).pairs
            for shard in self.wanted
            for unit, ranges in shard.units.items()
        )

    def split(self, shards: Shards) -> tuple[Shards, Shards]:
        """What of these shards goes into the part, and what is left of them."""
        wanted = Coverage(self.wanted)
        taken = [_both(shard, wanted.of(shard.uri, shard.identity)) for shard in shards]
        left = [_without(shard, part) for shard, part in zip(shards, taken, strict=True)]
        return telling(taken), telling(left)


def _asked(shard: ShardCoverage, new: Fingerprint) -> ShardCoverage:
    units = {unit: ranges for unit, ranges in shard.units.items() if unit in new.questions}
    return replace(shard, units=units)


def _both(shard: ShardCoverage, wanted: ShardCoverage) -> ShardCoverage:
    """An answer that stands for all questions of its source row goes with any of them."""
    rows = reduce(or_, wanted.units.values(), Ranges())
    limits: Mapping[str, Ranges] = {**wanted.units, NULL_QUESTION: rows}
    units = {u: ranges & limits.get(u, Ranges()) for u, ranges in shard.units.items()}
    total = shard.rows_total if wanted.rows_total is not None else None
    return replace(shard, rows_total=total, units={u: r for u, r in units.items() if r.pairs})


def _without(shard: ShardCoverage, taken: ShardCoverage) -> ShardCoverage:
    units = {u: ranges - taken.units.get(u, Ranges()) for u, ranges in shard.units.items()}
    total = shard.rows_total if taken.rows_total is None else None
    return replace(shard, rows_total=total, units={u: r for u, r in units.items() if r.pairs})
