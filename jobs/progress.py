"""How a run shows how far it is: a live line on a terminal, plain log lines anywhere else.

Everything goes to stderr. Knows no Ray: whoever runs the job calls `advance`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

LOG_INTERVAL_S = 5.0


@dataclass
class Pace:
    """What has been answered since the start of this run, and how many shards are done of how many.

    `shards_done` counts those that earlier runs completed, too; `waiting` are answers that are not
    in the store yet. `most_answers`: of this run, null where it is not known.
    """

    most_answers: int | None = None
    shards_total: int = 0
    shards_done: int = 0
    shards_done_before: int = 0
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    waiting: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def answers(self) -> int:
        return self.ok + self.failed + self.skipped + self.waiting

    def elapsed_s(self, now: float) -> float:
        return max(now - self.started, 0.0)

    def rate(self, now: float) -> float:
        """Answers a second."""
        elapsed = self.elapsed_s(now)
        return self.answers / elapsed if elapsed else 0.0

    def left_s(self, now: float) -> float | None:
        """Time left, from the answers or the shards of this run; null until there is one."""
        if self.most_answers is not None:
            done, left = self.answers, self.most_answers - self.answers
        else:
            done = self.shards_done - self.shards_done_before
            left = self.shards_total - self.shards_done
        return self.elapsed_s(now) / done * max(left, 0) if done > 0 else None

    def line(self, now: float) -> str:
        most = "" if self.most_answers is None else f"/{self.most_answers:,}"
        parts = [
            f"{self.answers:,}{most} answers",
            f"{self.rate(now):.1f}/s",
            f"{self.failed:,} failed",
            f"{self.shards_done:,}/{self.shards_total:,} shards",
            f"{duration(self.elapsed_s(now))} elapsed",
        ]
        left = self.left_s(now)
        return ", ".join(parts if left is None else [*parts, f"about {duration(left)} left"])


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Display(Protocol):
    """Where the pace of a run is shown."""

    def start(self, line: Callable[[], str]) -> None: ...
    def update(self, line: Callable[[], str]) -> None: ...
    def stop(self, line: Callable[[], str]) -> None: ...


class LiveLine:
    """One line at the bottom of a terminal, redrawn several times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def start(self, line: Callable[[], str]) -> None:
        self._live = Live(
            get_renderable=lambda: Text(line(), no_wrap=True, overflow="ellipsis"),
            console=self._console,
            refresh_per_second=4,
        )
        self._live.start()

    def update(self, line: Callable[[], str]) -> None:
        """The terminal is redrawn on its own."""

    def stop(self, line: Callable[[], str]) -> None:
        if self._live:
            self._live.stop()
            self._live = None


class LogLines:
    """A line every few seconds, and a last one."""

    def __init__(self, console: Console, *, interval_s: float = LOG_INTERVAL_S) -> None:
        self._console, self._interval_s = console, interval_s
        self._last = 0.0

    def start(self, line: Callable[[], str]) -> None:
        self._print(line())

    def update(self, line: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= self._interval_s:
            self._print(line())

    def stop(self, line: Callable[[], str]) -> None:
        self._print(line())

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class Progress:
    """The progress of one run. Use as a context manager, or call `stop` whatever happens."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self.pace = Pace()
        self._display: Display = LiveLine(console) if console.is_terminal else LogLines(console)
        self._is_shown = False

    def start(
        self, shards_total: int, shards_done: int = 0, *, most_answers: int | None = None
    ) -> None:
        """`shards_done`: the shards that earlier runs completed. `most_answers`: of this run."""
        self.pace = Pace(
            most_answers=most_answers,
            shards_total=shards_total,
            shards_done=shards_done,
            shards_done_before=shards_done,
        )
        self._is_shown = True
        self._display.start(self._line)

    def advance(
        self, *, ok: int = 0, failed: int = 0, skipped: int = 0, shards_done: int = 0
    ) -> None:
        """Add what has been answered, and the shards completed, since the last call."""
        self.pace.ok += ok
        self.pace.failed += failed
        self.pace.skipped += skipped
        self.pace.shards_done += shards_done
        self._display.update(self._line)

    def wait(self, answers: int) -> None:
        """Set how many answers are not in the store yet."""
        self.pace.waiting = answers
        self._display.update(self._line)

    def stop(self) -> None:
        """Show the last state and leave the terminal as it was; a second call does nothing."""
        if self._is_shown:
            self._is_shown = False
            self._display.stop(self._line)

    def _line(self) -> str:
        return self.pace.line(time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
