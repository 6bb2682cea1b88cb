"""Which answers stand when the source changes: shards that are new, changed or gone.

    in the source as it was answered    they stand, and what is missing is answered
    changed, `replace`                  they go, and the shard is answered again
    changed, `keep`, was complete       they stand, and the new version is not read
    changed, `keep`, was not complete   as with `replace`: nobody can complete it any more
    gone                                they go with `replace`, and stand with `keep`

Knows names and numbers only: no files, no store.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pipeline.coverage import Coverage, Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION
from pipeline.sources.base import Shard

OnChange = Literal["replace", "keep"]


@dataclass(frozen=True)
class Versions:
    """The shards of the source as they are, and what stands though nobody can read it any more."""

    current: Mapping[str, str]
    kept: Mapping[str, ShardCoverage]
    on_change: OnChange

    @classmethod
    def of(cls, shards: Iterable[Shard], answered: Coverage, *, on_change: OnChange) -> Self:
        current = {shard.uri: shard.identity for shard in shards}
        kept: dict[str, ShardCoverage] = {}
        for shard in answered if on_change == "keep" else ():
            if _is_kept(shard, answered, current=current):
                known = kept.get(shard.uri)
                kept[shard.uri] = shard if known is None else known | shard
        return cls(current, kept, on_change)

    def stand(self, shard: ShardCoverage) -> bool:
        """Whether answers to this version of the shard belong into the table."""
        if shard.uri not in self.current:
            return self.on_change == "keep"
        if kept := self.kept.get(shard.uri):
            return kept.identity == shard.identity
        return self.current[shard.uri] == shard.identity

    def standing(self, shards: Iterable[ShardCoverage]) -> tuple[ShardCoverage, ...]:
        return tuple(shard for shard in shards if self.stand(shard))

    def have_nothing_of(self, answered: Coverage) -> bool:
        """Whether all that was answered is about shards that are gone."""
        return bool(len(answered)) and not any(shard.uri in self.current for shard in answered)

    def done(self, shard: Shard, answered: Coverage, *, units: Sequence[str]) -> ShardCoverage:
        """What need not be answered of a shard; all of it, where an earlier version stands."""
        kept = self.kept.get(shard.uri)
        if kept is None or kept.rows_total is None:
            return answered.of(shard.uri, shard.identity)
        every = Ranges.of([(0, kept.rows_total)])
        return ShardCoverage(
            shard.uri, shard.identity, kept.rows_total, dict.fromkeys(units, every)
        )


ALL_STAND = Versions({}, {}, on_change="keep")
"""As long as nobody has looked at the source."""


def _is_kept(shard: ShardCoverage, answered: Coverage, *, current: Mapping[str, str]) -> bool:
    identity = current.get(shard.uri)
    if identity is None:
        return True
    if identity == shard.identity or answered.of(shard.uri, identity).units:
        return False
    return shard.is_complete([unit for unit in shard.units if unit != NULL_QUESTION])
