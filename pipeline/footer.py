"""What a part of the answer table says about itself, so that nobody has to read its rows.

    Footer
    ├── shards        what it covers of each shard, per unit, and where the shard ends
    ├── fingerprint   what decided its answers
    ├── run_ids       which runs answered
    └── tally         how many rows are ok, failed and skipped, and why

Resuming, totals and `verify` rest on it. This module knows JSON, not Parquet (`parts.py`), and not
what a fingerprint is made of: names and values, equal or not.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.coverage import ShardCoverage
from schemas.errors import JobError
from schemas.tables import SCHEMA_VERSION

STATUSES = ("ok", "failed", "skipped")
NULL_QUESTION = ""
"""The unit of rows whose `question_id` is null. It stands beside the units that such a row answers
(all of an unreadable row's, or the row's own questions that cannot be known), so that a source row
has one such answer at most, whichever units were asked first. No question id is empty."""
MAX_MESSAGE = 500


@dataclass(frozen=True)
class Fingerprint:
    """What decides an answer: values by name for the model's side, a hash for each unit asked."""

    model: Mapping[str, str]
    questions: Mapping[str, str]

    def __or__(self, other: "Fingerprint") -> "Fingerprint":
        """Both sets of questions; the models are the same, or `differences` was not asked."""
        return Fingerprint(self.model, {**self.questions, **other.questions})

    def differences(self, new: "Fingerprint") -> list[str]:
        """What answers under `self` and under `new` would not share, one line each.

        A question that only one of them asks is no difference.
        """
        models = [
            f"model {name}: was {self.model.get(name)!r}, is now {new.model.get(name)!r}"
            for name in sorted({*self.model, *new.model})
            if self.model.get(name) != new.model.get(name)
        ]
        questions = [
            f"question {unit!r}: was {self.questions[unit]!r}, is now {new.questions[unit]!r}"
            for unit in self.questions
            if unit in new.questions and self.questions[unit] != new.questions[unit]
        ]
        return models + questions

    def to_json(self) -> dict[str, Any]:
        return {"model": dict(self.model), "questions": dict(self.questions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(model=dict(data["model"]), questions=dict(data["questions"]))


@dataclass(frozen=True)
class Failures:
    """How many rows failed with one class of error, and the first of them."""

    count: int
    uri: str
    index: int
    message: str

    def __add__(self, other: "Failures") -> "Failures":
        return Failures(self.count + other.count, self.uri, self.index, self.message)

    def to_json(self) -> dict[str, Any]:
        example = {"uri": self.uri, "index": self.index, "message": self.message}
        return {"count": self.count, "example": example}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(count=data["count"], **data["example"])


@dataclass(frozen=True)
class Tally:
    """What became of rows: how many of each status, and the failures by class."""

    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    failures: Mapping[str, Failures] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def __add__(self, other: "Tally") -> "Tally":
        counts = {name: self.counts[name] + other.counts[name] for name in STATUSES}
        failures = dict(self.failures)
        for name, more in other.failures.items():
            failures[name] = failures[name] + more if name in failures else more
        return Tally(counts, failures)

    def __sub__(self, other: "Tally") -> "Tally":
        """The counts alone: which failures are left over, nobody can tell."""
        return Tally({name: self.counts[name] - other.counts[name] for name in STATUSES})

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """The tally of answer rows; wants their place, status and error columns.

        Raises JobError for a status that the table does not know.
        """
        counts: Counter[str] = Counter()
        failures: dict[str, Failures] = {}
        for row in rows:
            if row["status"] not in STATUSES:
                raise JobError(
                    f"{row['source_uri']} row {row['source_index']}: status {row['status']!r} "
                    f"is none of {', '.join(STATUSES)}"
                )
            counts[row["status"]] += 1
            if row["status"] == "failed":
                message = str(row["error_message"])[:MAX_MESSAGE]
                one = Failures(1, row["source_uri"], row["source_index"], message)
                name = str(row["error_class"])
                failures[name] = failures[name] + one if name in failures else one
        return cls({name: counts[name] for name in STATUSES}, failures)


TALLY_COLUMNS = ("source_uri", "source_index", "status", "error_class", "error_message")
"""The columns of the answer table that `Tally.of` reads."""


@dataclass(frozen=True)
class Footer:
    """What one part covers, under which fingerprint, and what became of its rows.

    `again`: it is staged, and its rows take the place of failed ones (`again.py`).
    """

    shards: tuple[ShardCoverage, ...]
    fingerprint: Fingerprint
    run_ids: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    again: bool = False

    @property
    def key(self) -> str:
        """A name for what is covered: the same for whoever covers the same, whatever came out."""
        covered: dict[str, Any] = {
            "shards": self._shards_json(),
            "fingerprint": self.fingerprint.to_json(),
            **({"again": True} if self.again else {}),
        }
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        data = {
            "version": SCHEMA_VERSION,
            "shards": self._shards_json(),
            "fingerprint": self.fingerprint.to_json(),
            "run_ids": list(self.run_ids),
            "counts": dict(self.tally.counts),
            "failures": {name: f.to_json() for name, f in self.tally.failures.items()},
            **({"again": True} if self.again else {}),
        }
        return json.dumps(data, separators=(",", ":")).encode()

    def _shards_json(self) -> list[dict[str, Any]]:
        return [s.to_json() for s in sorted(self.shards, key=lambda s: (s.uri, s.identity))]

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Self:
        """The footer of the file `name`. Raises JobError where it cannot be understood."""
        try:
            return cls._from_json(json.loads(data), name=name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(
                f"{name}: its `lavaflow` footer is damaged ({error!r}); move the file away and "
                "run the job again: its rows are answered again"
            ) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any], *, name: str) -> Self:
        if data["version"] != SCHEMA_VERSION:
            raise JobError(
                f"{name}: footer version {data['version']!r}, this lavaflow reads "
                f"{SCHEMA_VERSION}; use the lavaflow that wrote it, or another output.path"
            )
        failures = {name: Failures.from_json(f) for name, f in data["failures"].items()}
        return cls(
            shards=tuple(ShardCoverage.from_json(shard) for shard in data["shards"]),
            fingerprint=Fingerprint.from_json(data["fingerprint"]),
            run_ids=tuple(data["run_ids"]),
            tally=Tally({name: data["counts"][name] for name in STATUSES}, failures),
            again=data.get("again", False),
        )
