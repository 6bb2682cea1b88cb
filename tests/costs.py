"""What kills cost, from the log of the runs that were killed (`kills.py`)."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.kills import Line


@dataclass(frozen=True)
class Life:
    """From a run's start to its end, in the system's time."""

    start: float
    end: float


@dataclass
class Cost:
    """Answers begun in one life, those of them begun again in a later one, and how many may be."""

    begun: int = 0
    repeated: int = 0
    bound: int = 0


def costs_of(
    lines: Sequence[Line], lives: Sequence[Life], *, in_flight: int, durable_s: float
) -> list[Cost]:
    """The cost of the end of each life.

    What may be lost: `in_flight` answers, and those that were given in the last `durable_s`.
    """
    starts = [life.start for life in lives]
    costs = [Cost() for _ in lives]
    last: dict[Any, int] = {}
    for line in lines:
        if line.event == "begun":
            life = bisect(starts, line.at) - 1
            costs[life].begun += 1
            if line.identity in last:
                costs[last[line.identity]].repeated += 1
            last[line.identity] = life
    for cost, life in zip(costs, lives, strict=True):
        since = max(life.start, life.end - durable_s)
        young = [x for x in lines if x.event == "answered" and since <= x.at <= life.end]
        cost.bound = in_flight + len(young)
    return costs


def longest_until_durable_s(lines: Sequence[Line]) -> float:
    """The longest time from an answer to its being durable."""
    answered: dict[Any, float] = {}
    longest = 0.0
    for line in lines:
        if line.event == "answered":
            answered[line.identity] = line.at
        elif line.event == "durable":
            longest = max(longest, line.at - answered.get(line.identity, line.at))
    return longest
