"""The way of answers to the store: blocks are gathered for a while, then written as one part.

The driver sees references only; the rows go from the stage that made them to the task that writes
them. A few writes run at a time; while they do not keep up, nothing more is taken.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from pipeline.footer import Fingerprint
from pipeline.parts import RECEIPT
from pipeline.write import write_part
from schemas.job import OutputSpec

MOST_WRITES = 4
"""Writes at a time. Each waits for the store most of its time, and so asks for no CPU."""
MOST_BYTES = 64 * 2**20
"""Gathered blocks of this size are written at once: Ray Data counts them as not yet taken."""
WRITE_RETRIES = 3
"""How often Ray repeats a write whose worker has died."""

Slice = tuple[int, int] | None
"""First row and end within a block; None for all of it."""


class Gathered:
    """Blocks of `answered_schema(keep)` on their way to becoming parts.

    A source row's answers lie in one bundle, and a bundle goes into one part.
    """

    def __init__(
        self,
        output: OutputSpec,
        *,
        keep: Mapping[str, pa.DataType],
        fingerprint: Fingerprint,
        again: bool = False,
        say: Callable[[str], None],
    ) -> None:
        self._rows_per_part = output.rows_per_file
        self._say = say
        self._write = ray.remote(num_cpus=0, max_retries=WRITE_RETRIES)(_write)
        self._arguments = {
            "output": output,
            "keep": keep,
            "fingerprint": fingerprint,
            "again": again,
        }
        self._writing: dict[ray.ObjectRef, int] = {}
        self._begun: dict[ray.ObjectRef, float] = {}
        self.seconds = 0.0
        """That writes have taken, one after the other."""
        self._empty()

    @property
    def has_room(self) -> bool:
        return len(self._writing) < MOST_WRITES

    @property
    def rows(self) -> int:
        """Rows that are not durable yet."""
        return self._rows + sum(self._writing.values())

    def add(self, bundle: Any) -> None:
        """Take a RefBundle of Ray Data's; its blocks live until they are written."""
        rows = bundle.num_rows()
        if not rows:
            return
        if not self._blocks:
            self._since = time.monotonic()
        self._blocks += bundle.block_refs
        self._slices += [s and (s.start_offset, s.end_offset) for s in bundle.slices]
        self._rows += rows
        self._bytes += bundle.size_bytes()

    def write(self, *, older_than_s: float) -> None:
        """Start to write what is gathered, if there is room and it is old or large enough."""
        is_large = self._rows >= self._rows_per_part or self._bytes >= MOST_BYTES
        is_old = time.monotonic() - self._since >= older_than_s
        if self._blocks and self.has_room and (is_large or is_old):
            write = self._write.remote(self._arguments, self._slices, *self._blocks)
            self._writing[write] = self._rows
            self._begun[write] = time.monotonic()
            self._empty()

    def receipt(self, *, timeout_s: float) -> pa.Table:
        """The receipt of the next write that is over; empty where none is within this time.

        Raises as `write_part` does, as a RayTaskError.
        """
        if not self._writing:
            return RECEIPT.empty_table()
        done, _ = ray.wait(list(self._writing), timeout=timeout_s)
        return self._receipt_of(done[0]) if done else RECEIPT.empty_table()

    def _receipt_of(self, write: ray.ObjectRef) -> pa.Table:
        rows = self._writing.pop(write)
        self.seconds += time.monotonic() - self._begun.pop(write)
        try:
            return ray.get(write)
        except ray.exceptions.RayError as error:
            if (loss := _loss_in(error)) is None:
                raise
            reason = str(loss).partition("\n")[0]
            self._say(f"{rows:,} answers were lost before they were written ({reason})")
            return RECEIPT.empty_table()

    def _empty(self) -> None:
        self._blocks: list[ray.ObjectRef] = []
        self._slices: list[Slice] = []
        self._rows = self._bytes = 0
        self._since = time.monotonic()


def _write(arguments: Mapping[str, Any], slices: Sequence[Slice], *blocks: pa.Table) -> pa.Table:
    """The task: blocks to one part; returns its receipt."""
    parts = [
        block if piece is None else block.slice(piece[0], piece[1] - piece[0])
        for block, piece in zip(blocks, slices, strict=True)
    ]
    return write_part(pa.concat_tables([part for part in parts if part.num_rows]), **arguments)


def _loss_in(error: ray.exceptions.RayError) -> ray.exceptions.RayError | None:
    """How a worker or a block was lost; None where the write itself has failed."""
    # A block that is lost is raised by the task that wants it.
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return cause if isinstance(cause, ray.exceptions.RayError) else None
