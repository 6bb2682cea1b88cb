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

END = 2**63 - 1
"""Past the last row that a shard can have."""


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

    @classmethod
    def starting(cls, start: int) -> Self:
        """Every row from `start` on; none where that is END."""
        return cls.of([(start, END)])

    @property
    def tail(self) -> int:
        """From here on every row is in the set; END where there is no such row."""
        return self.pairs[-1][0] if self.pairs and self.pairs[-1][1] == END else END

    def __or__(self, other: "Ranges") -> "Ranges":
        return Ranges.of((*self.pairs, *other.pairs))

    def __and__(self, other: "Ranges") -> "Ranges":
        return Ranges.of(self._overlaps(other))

    def _overlaps(self, other: "Ranges") -> Iterator[tuple[int, int]]:
        """Some of them empty."""
        at = other_at = 0
        while at < len(self.pairs) and other_at < len(other.pairs):
            (start, stop), (other_start, other_stop) = self.pairs[at], other.pairs[other_at]
            yield max(start, other_start), min(stop, other_stop)
            if stop <= other_stop:
                at += 1
            else:
                other_at += 1

    def __sub__(self, other: "Ranges") -> "Ranges":
        return self & other._gaps()

    def _gaps(self) -> "Ranges":
        """Every row that is not in the set."""
        stops = (0, *(stop for _, stop in self.pairs))
        starts = (*(start for start, _ in self.pairs), END)
        return Ranges.of(zip(stops, starts, strict=True))

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
            rows_total=longest(self.rows_total, other.rows_total),
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
        return self.rows_total is not None and self.has_first(self.rows_total, wanted)

    def has_first(self, rows: int, wanted: Iterable[str]) -> bool:
        """Whether so many of the shard's rows, the first ones, have answers for every unit."""
        return all(self.units.get(unit, Ranges()).covers(0, rows) for unit in wanted)

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


def longest(*rows_totals: int | None) -> int | None:
    """A shard that broke off once is longer than it seemed; it never has fewer rows."""
    return max((total for total in rows_totals if total is not None), default=None)


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
