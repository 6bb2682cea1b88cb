"""Writing parts of the table again, under their names: without some rows, or with others.

Each part is one step: a reader finds it as it was or as it is. What has to be done to a part
follows from the part itself, the source and what is staged, and doing it twice does nothing: a run
that is killed in between needs no record, the next one finds what is left to be done.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa

from pipeline.again import OUTCOME, PART, PLACE, Place, Swap, at_places, swapped
from pipeline.coverage import Coverage, ShardCoverage
from pipeline.fold import rows_of
from pipeline.footer import Footer
from pipeline.parts import (
    ANSWERS,
    SUFFIX,
    PartInfo,
    part_bytes,
    read_columns,
    read_part,
    tally_of,
)
from pipeline.storage import READERS, Output
from schemas.errors import JobError


class Revision:
    """The parts of a table while they are written again; `footers`: as each says it now.

    `there`: the parts' identities, as they were before the parts were read. `check` raises where
    the output is not ours any more.
    """

    def __init__(
        self,
        output: Output,
        parts: Iterable[PartInfo],
        *,
        there: Mapping[str, str],
        check: Callable[[], None],
    ) -> None:
        self.footers = {part.name: part.footer for part in parts}
        self._output, self._there, self._check = output, there, check

    def keep_only(self, stand: Callable[[ShardCoverage], bool]) -> None:
        """Take out what does not stand, and the parts of which an earlier run has left nothing."""
        for name, footer in list(self.footers.items()):
            standing = tuple(shard for shard in footer.shards if stand(shard))
            if not footer.shards:
                self._output.remove(name)
                del self.footers[name]
            elif standing != footer.shards:
                answers = rows_of(read_part(self._output, name), standing)
                kept = replace(footer, shards=standing, tally=tally_of(answers))
                self.rewrite(name, answers, kept)

    def swap(self, swaps: Mapping[str, Sequence[Swap]], answers: pa.Table, *, new: Footer) -> None:
        """Put new answers in the place of failed rows, in each part that has such."""
        ends: dict[str, set[int]] = defaultdict(set)
        for each in itertools.chain.from_iterable(swaps.values()):
            if each.ends_shard:
                ends[each.place[0]].add(each.place[1] + 1)
        for name, footer in self.footers.items():
            # First: were the row replaced that was the last, and this left, the rest were lost.
            shards = tuple(_without_end(shard, ends) for shard in footer.shards)
            if shards != footer.shards and name not in swaps:
                answers_there, _ = read_part(self._output, name)
                self.rewrite(name, answers_there, replace(footer, shards=shards))
        for name, of_part in swaps.items():
            part = swapped(read_part(self._output, name), of_part, answers, new=new)
            self.rewrite(name, *part)

    def rows_at(self, places: Mapping[Place, object], *, covered: Coverage) -> pa.Table:
        """PLACE, OUTCOME and PART of all rows there. `covered`: what is covered at these places."""
        names = [n for n, footer in self.footers.items() if covered.overlaps(footer.shards)]
        return self.rows_in(names, lambda rows: at_places(rows, places))

    def rows_in(self, names: Iterable[str], select: Callable[[pa.Table], pa.Table]) -> pa.Table:
        """PLACE, OUTCOME and PART of the rows of some parts that are selected."""

        def read(name: str) -> pa.Table:
            rows = select(read_columns(self._output, name, [*PLACE, *OUTCOME]))
            return rows.append_column(PART, pa.array([name] * len(rows), pa.string()))

        with ThreadPoolExecutor(READERS) as pool:
            return pa.concat_tables([NO_ROWS, *pool.map(read, names)])

    def rewrite(self, name: str, answers: pa.Table, footer: Footer) -> None:
        """Put this in the place of a part, once. Raises as `check` does."""
        data = part_bytes(answers, footer)
        if not self._output.rewrite(name, data, was=self._there[name], check=self._check):
            self._check_is(name, data)
        self.footers[name] = footer

    def _check_is(self, name: str, data: bytes) -> None:
        """The first try of an upload that was tried again has put it there; or somebody else."""
        if name in self._output.names(ANSWERS, suffix=SUFFIX) and self._output.read(name) == data:
            return
        self._check()
        raise JobError(
            f"{self._output.uri}/{name} was changed while this run was about to replace it; see "
            "that nothing else writes there and run the job again"
        )


NO_ROWS = pa.schema(
    [
        ("source_uri", pa.string()),
        ("source_index", pa.int64()),
        ("question_id", pa.string()),
        ("turn", pa.int16()),
        ("sample_number", pa.int16()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("run_id", pa.string()),
        ("attempts", pa.int16()),
        (PART, pa.string()),
    ]
).empty_table()


def _without_end(shard: ShardCoverage, ends: Mapping[str, Collection[int]]) -> ShardCoverage:
    return replace(shard, rows_total=None) if shard.rows_total in ends[shard.uri] else shard
