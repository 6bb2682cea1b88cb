"""Intents: what a fold is going to do, written down before it does it.

`intents/LEASE-NUMBER.json` names the part that will appear, what it covers, and the staged parts
that it is made of. Whoever holds the output next finishes what is open: a run that lost its lease
without noticing can then only repeat recorded work, which lands on itself.

    record intent -> is the lease still ours? -> publish part -> empty staging -> remove intent
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.coverage import ShardCoverage
from pipeline.fold import Shards
from pipeline.storage import Output
from schemas.errors import JobError

INTENTS = "intents"


@dataclass(frozen=True)
class Intent:
    """One fold: `part` is made of shares of the `staged` parts, of which `emptied` are used up."""

    part: str
    staged: Mapping[str, Shards]
    emptied: tuple[str, ...]

    @property
    def shards(self) -> Shards:
        return tuple(shard for shards in self.staged.values() for shard in shards)

    def to_bytes(self) -> bytes:
        staged = {name: [s.to_json() for s in shards] for name, shards in self.staged.items()}
        data = {"part": self.part, "staged": staged, "emptied": self.emptied}
        return json.dumps(data, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, place: str) -> "Intent":
        """Raises JobError where it cannot be understood."""
        try:
            return cls._from_json(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(
                f"{place}: is damaged ({error!r}); see that no run is at work, remove the file and "
                "run the job again"
            ) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> "Intent":
        staged = {
            name: tuple(ShardCoverage.from_json(shard) for shard in shards)
            for name, shards in data["staged"].items()
        }
        return cls(part=data["part"], staged=staged, emptied=tuple(data["emptied"]))


class Intents:
    """The intents of one output. Their names are the lease's number and a count: nobody else's."""

    def __init__(self, output: Output, *, lease_number: int) -> None:
        self._output = output
        self._lease_number = lease_number
        self._count = 0

    def record(self, intent: Intent) -> str:
        """Write the intent down; returns its name."""
        self._count += 1
        name = f"{INTENTS}/{self._lease_number:08}-{self._count:06}.json"
        self._output.publish(name, intent.to_bytes())
        return name

    def open(self) -> dict[str, Intent]:
        """The intents that nobody has finished, oldest first, by name."""
        found = {}
        for name in self._output.names(INTENTS, suffix=".json"):
            # One that is gone by now was finished by the run that recorded it.
            with contextlib.suppress(FileNotFoundError):
                data = self._output.read(name)
                found[name] = Intent.from_bytes(data, place=f"{self._output.uri}/{name}")
        return found
