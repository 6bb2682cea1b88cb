"""Which rows of which shards are answered: the arithmetic that writing and resuming share.

Coverage is kept per shard and per unit (a question id of `ask`, or `questions` for the rows' own)
as ranges of row indexes, so that its size grows with the number of holes, not of rows.
This module knows numbers and names only: no files, no Parquet, no ray.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Ranges:
    """A set of row indexes as sorted, disjoint, half-open [start, stop) pairs."""

    pairs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Self:
        """Any pairs, overlapping and unordered as they may be; empty ones vanish."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(pair for pair in pairs if pair[0] < pair[1]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    @classmethod
    def of_indexes(cls, indexes: Iterable[int]) -> Self:
        return cls.of((index, index + 1) for index in indexes)

    def __or__(self, other: "Ranges") -> "Ranges":
        return Ranges.of((*self.pairs, *other.pairs))

    def __and__(self, other: "Ranges") -> "Ranges":
        return Ranges.of((max(a, c), min(b, d)) for a, b in self.pairs for c, d in other.pairs)

    def __sub__(self, other: "Ranges") -> "Ranges":
        left = []
        for start, stop in self.pairs:
            for a, b in other.pairs:
                if a < stop and start < b:
                    left.append((start, a))
                    start = max(start, b)
            left.append((start, stop))
        return Ranges.of(left)

    def __contains__(self, index: int) -> bool:
        before = bisect.bisect_right(self.pairs, index, key=lambda pair: pair[0])
        return before > 0 and index < self.pairs[before - 1][1]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.pairs)

    def covers(self, start: int, stop: int) -> bool:
        return start >= stop or any(a <= start and stop <= b for a, b in self.pairs)


@dataclass(frozen=True)
class ShardCoverage:
    """What is answered of one shard. `rows_total` is null until its end was read."""

    uri: str
    identity: str
    rows_total: int | None = None
    units: Mapping[str, Ranges] = field(default_factory=dict)

    def __or__(self, other: "ShardCoverage") -> "ShardCoverage":
        names = {**self.units, **other.units}
        return ShardCoverage(
            uri=self.uri,
            identity=self.identity,
            rows_total=other.rows_total if self.rows_total is None else self.rows_total,
            units={
                name: self.units.get(name, Ranges()) | other.units.get(name, Ranges())
                for name in names
            },
        )

    def missing_units(self, index: int, wanted: Iterable[str]) -> list[str]:
        """Those of the wanted units that row `index` has no answers for, in their order."""
        return [unit for unit in wanted if index not in self.units.get(unit, Ranges())]

    def answered_rows(self, wanted: Iterable[str]) -> Ranges:
        """The rows that have answers for every wanted unit."""
        every = [self.units.get(unit, Ranges()) for unit in wanted]
        return functools.reduce(Ranges.__and__, every) if every else Ranges()

    def is_complete(self, wanted: Iterable[str]) -> bool:
        total = self.rows_total
        return total is not None and all(
            self.units.get(unit, Ranges()).covers(0, total) for unit in wanted
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": self.uri,
            "identity": self.identity,
            "rows_total": self.rows_total,
            "units": {name: [list(pair) for pair in r.pairs] for name, r in self.units.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            uri=data["uri"],
            identity=data["identity"],
            rows_total=data["rows_total"],
            units={n: Ranges.of((a, b) for a, b in r) for n, r in data["units"].items()},
        )


class Coverage:
    """What is answered of all shards, keyed by URI and identity."""

    def __init__(self, shards: Iterable[ShardCoverage] = ()) -> None:
        self._shards: dict[tuple[str, str], ShardCoverage] = {}
        self.add_all(shards)

    def add_all(self, shards: Iterable[ShardCoverage]) -> None:
        for shard in shards:
            self.add(shard)

    def overlaps(self, shards: Iterable[ShardCoverage]) -> bool:
        """Whether any answer that these shards cover is covered here."""
        return any(
            (ranges & self.of(shard.uri, shard.identity).units.get(unit, Ranges())).pairs
            for shard in shards
            for unit, ranges in shard.units.items()
        )

    def add(self, shard: ShardCoverage) -> None:
        key = (shard.uri, shard.identity)
        known = self._shards.get(key)
        self._shards[key] = shard if known is None else known | shard

    def of(self, uri: str, identity: str) -> ShardCoverage:
        return self._shards.get((uri, identity), ShardCoverage(uri, identity))

    def __iter__(self) -> Iterator[ShardCoverage]:
        return iter(self._shards.values())

    def __len__(self) -> int:
        return len(self._shards)
