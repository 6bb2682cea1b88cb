"""A run over one output, without Ray: what workers stage, and the driver's side of the commit."""

from collections.abc import Sequence
from typing import Any

from pipeline.commit import AnswerTable
from pipeline.footer import Fingerprint
from pipeline.sources.base import Shard
from pipeline.versions import OnChange
from pipeline.write import write_part
from schemas.job import OutputSpec
from tests.answered import FINGERPRINT, IDENTITY, FreeLease, answered

SHARDS = [Shard("a.tar", IDENTITY)]


class Run:
    """A run over one output, as the driver and its workers do it."""

    def __init__(
        self,
        path: object,
        *,
        fingerprint: Fingerprint = FINGERPRINT,
        shards: Sequence[Shard] = SHARDS,
        on_change: OnChange = "replace",
        **output: Any,
    ) -> None:
        is_forced = output.pop("is_forced", False)
        self.spec = OutputSpec(path=str(path), **{"rows_per_file": 4, **output})
        self.fingerprint = fingerprint
        self.table = AnswerTable(self.spec, keep={}, fingerprint=fingerprint)
        if is_forced:
            self.table.force()
        self.lease = FreeLease()
        self.table.recover(self.lease)
        self.table.open(shards, on_change=on_change)
        self.removed = self.table.remove_stale()
        self.output = self.table.output

    def stage(self, *rows: list[dict], again: bool = False) -> str:
        """Write a part as a worker does, without telling the driver; its name."""
        settings: dict[str, Any] = {"output": self.spec, "fingerprint": self.fingerprint}
        receipt = write_part(answered(*rows), keep={}, again=again, **settings)
        self.receipt = receipt
        (name,) = receipt["part"].to_pylist()
        return name

    def write(self, *rows: list[dict], again: bool = False) -> str:
        name = self.stage(*rows, again=again)
        self.table.commit(self.receipt)
        return name

    def files(self, folder: str) -> list[str]:
        return self.output.names(folder, suffix="")
