"""The engine and `generate` answer one workload in turns.

A speed-up is the median of the ratios that the rounds give.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from jobs.baseline import Baseline, Setting, Tokens
from jobs.workload import Workload
from pipeline.engine.request import Answer, Engine
from schemas.errors import JobError

CLOSE = 0.9
"""Of the fastest setting's rate in the trial: a slower one runs in no round."""

Say = Callable[[str], None]


@dataclass
class Lane:
    """One setting of `generate`: its rate in the trial (0: it does not fit) and in each round."""

    kind: str
    setting: Setting
    trial: float
    rounds: list[float] = field(default_factory=list)


@dataclass
class Race:
    """`rates` are the engine's, one a round, in `work.unit`. `lanes` run in every round, `trials`
    are all that were tried."""

    engine: Engine
    baseline: Baseline
    work: Workload
    say: Say
    rates: list[float] = field(default_factory=list)
    trials: list[Lane] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    _looks: int = 0

    def run(self, kinds: Mapping[str, Sequence[Setting]], *, rounds: int) -> None:
        """Try every setting, which warms both sides up, then let the fastest take turns with the
        engine. Raises JobError where an answer fails, or no setting of a kind fits."""
        self.say(f"warm-up: engine {self._engine_rate():.1f} {self.work.unit}")
        n_tried = 2 * max(setting.batch_size for tried in kinds.values() for setting in tried)
        for kind, settings in kinds.items():
            tried = [Lane(kind, s, self._trial(kind, s, n_tried)) for s in settings]
            self.trials += tried
            self.lanes += _fastest(tried)
        for n in range(rounds):
            self.rates.append(self._engine_rate())
            for lane in self.lanes:
                lane.rounds.append(self._rate(lane.setting, len(self.work.rows)))
            told = [
                f"{lane.kind} {lane.rounds[-1]:.1f} (batches of {lane.setting.batch_size})"
                for lane in self.lanes
            ]
            head = f"round {n + 1} of {rounds}: engine {self.rates[-1]:.1f}"
            self.say(", ".join([head, *told]) + f"; {self.work.unit}")

    def lane(self, kind: str) -> Lane:
        """The setting of that kind that the engine gains least against."""
        return min((lane for lane in self.lanes if lane.kind == kind), key=self.speedup)

    def speedup(self, lane: Lane) -> float:
        return median(ours / theirs for ours, theirs in zip(self.rates, lane.rounds, strict=True))

    def _engine_rate(self) -> float:
        requests = self.work.requests(self._looks)
        self._looks += 1
        start = time.perf_counter()
        answered = self.engine.submit(requests)
        elapsed_s = time.perf_counter() - start
        tokens_of(self.work, answered)
        return self.work.units(self.work.rows) / elapsed_s

    def _trial(self, kind: str, setting: Setting, n_rows: int) -> float:
        try:
            self.baseline.warm_up(self.work.rows, setting)
            rate = self._rate(setting, n_rows)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rate = 0.0
        self.say(
            f"warm-up: {kind} in batches of {setting.batch_size} "
            + (f"{rate:.1f} {self.work.unit}" if rate else "does not fit the memory")
        )
        return rate

    def _rate(self, setting: Setting, n_rows: int) -> float:
        rows = self.work.rows[:n_rows]
        start = time.perf_counter()
        self.baseline.answer(rows, setting)
        return self.work.units(rows) / (time.perf_counter() - start)


def _fastest(tried: Sequence[Lane]) -> list[Lane]:
    best = max(lane.trial for lane in tried)
    if not best:
        sizes = ", ".join(str(lane.setting.batch_size) for lane in tried)
        raise JobError(
            f"generate does not fit the memory in batches of {sizes}: name a smaller --batch-size"
        )
    return [lane for lane in tried if lane.trial >= CLOSE * best]


def tokens_of(work: Workload, answered: Sequence[Sequence[Any]]) -> list[Tokens]:
    """Each row's tokens. Raises JobError for a row that failed, or is not as long as imposed."""
    outcomes = [outcome for outcomes in answered for outcome in outcomes]
    tokens = []
    for row, outcome in zip(work.rows, outcomes, strict=True):
        if not isinstance(outcome, Answer):
            raise JobError(f"the engine gave no answer: {type(outcome).__name__}: {outcome}")
        if len(outcome.token_ids) != row.new_tokens:
            raise JobError(
                f"the engine gave {len(outcome.token_ids)} tokens of {row.new_tokens} that were "
                "asked for, with the end tokens switched off"
            )
        tokens.append(list(outcome.token_ids))
    return tokens
