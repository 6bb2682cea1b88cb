"""The ledger: the footers of many parts folded into one, so that resuming reads one file.

`ledger.json.gz` names the parts that it stands for, each with its etag (or size and time). It is a
cache: where one of them is gone or another file, nothing in it counts, and the footers themselves
are read. Parts that it does not name are read beside it.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any, Self

import pyarrow as pa

from pipeline.coverage import Coverage
from pipeline.footer import Fingerprint, Footer, Tally
from pipeline.storage import Output
from schemas.errors import JobError

LEDGER = "ledger.json.gz"
FASTEST = 1
"""Of gzip's levels."""
UNRECORDED_PARTS = 16
"""Parts that may be missing in the file, and an eighth of those it names beside: however many there
are, writing it again and again costs a few times its last size."""
UNREADABLE = (EOFError, OSError, zlib.error, ValueError, KeyError, TypeError, AttributeError)
"""What bytes raise that are no ledger."""


class Ledger:
    """What the parts of a table say together. They share one schema and one model."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.names: set[str] = set()
        self.coverage = Coverage()
        self.tally = Tally()
        self.fingerprint = Fingerprint({}, {})
        self._recorded = 0

    @classmethod
    def of(cls, schema: pa.Schema, footers: Mapping[str, Footer]) -> Self:
        """Of these parts, whatever the file says of them."""
        ledger = cls(schema)
        for name, footer in footers.items():
            ledger.add(name, footer)
        return ledger

    def add(self, name: str, footer: Footer) -> None:
        """Take in one part more."""
        self.names.add(name)
        self._add(footer)

    def _add(self, footer: Footer) -> None:
        self.coverage.add_all(footer.shards)
        self.tally += footer.tally
        self.fingerprint = footer.fingerprint | self.fingerprint

    @property
    def is_behind(self) -> bool:
        """Whether the file is worth writing again in the middle of a run."""
        return len(self.names) - self._recorded > UNRECORDED_PARTS + self._recorded // 8

    def write(self, output: Output, *, there: Mapping[str, str]) -> None:
        """Write the file, unless it says all this already. `there`: the parts' identities."""
        if self._recorded == len(self.names):
            return
        footer = Footer(tuple(self.coverage), self.fingerprint, tally=self.tally)
        data = {
            "parts": {name: there[name] for name in sorted(self.names & there.keys())},
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "footer": json.loads(footer.to_bytes()),
        }
        text = json.dumps(data, separators=(",", ":")).encode()
        output.replace(LEDGER, gzip.compress(text, FASTEST))
        self._recorded = len(self.names)

    @classmethod
    def read(cls, output: Output, *, there: Mapping[str, str]) -> Self | None:
        """The ledger in the file; null where there is none that fits the parts that are `there`."""
        try:
            data = output.read(LEDGER)
        except FileNotFoundError:
            return None
        try:
            return cls._from_json(json.loads(gzip.decompress(data)), there=there)
        except (*UNREADABLE, JobError, pa.ArrowException):
            return None

    @classmethod
    def _from_json(cls, data: Mapping[str, Any], *, there: Mapping[str, str]) -> Self | None:
        if any(there.get(name) != identity for name, identity in data["parts"].items()):
            return None
        ledger = cls(pa.ipc.read_schema(pa.BufferReader(base64.b64decode(data["schema"]))))
        ledger.names = set(data["parts"])
        ledger._recorded = len(ledger.names)
        ledger._add(Footer.from_bytes(json.dumps(data["footer"]).encode(), name=LEDGER))
        return ledger
