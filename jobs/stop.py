"""How a run is stopped: the first signal asks, a second one, or the clock, insists.

    SIGINT or SIGTERM          `is_asked`: what is in flight is finished, nothing new begins
    again, or after grace_s    KeyboardInterrupt or Terminated is raised, wherever the run is

Ctrl-C reaches the whole process group of a terminal: Ray's processes block SIGINT. They do not
block SIGTERM: sent to the group, it leaves them some ten seconds.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from jobs.exits import Terminated
from jobs.progress import duration

STDERR = 2
REASONS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
}


class Stop:
    """Listens from `listen` to the end of the block; until then, a signal ends the run at once.

    Or nearly: an exception that is raised while a C extension is imported may be swallowed.

    Python handles signals in the main thread only: a run in another one is never asked.
    """

    def __init__(self, *, grace_s: float) -> None:
        self._grace_s = grace_s
        self._before: dict[int, Any] = {}
        self.reason: type[BaseException] = KeyboardInterrupt
        """What ends the command that was stopped; raised by whoever has finished what it had."""
        # The main thread must not wait on it: the handler would set it in the midst of that.
        self.asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        return self.asked.is_set()

    def listen(self) -> None:
        self._handle_by(self._ask)

    def _handle_by(self, handler: Callable[[int, FrameType | None], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in REASONS:
            # Commands that a script has put in the background are told to ignore SIGINT.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before.setdefault(signum, signal.signal(signum, handler))

    def _end(self, signum: int, frame: FrameType | None) -> None:
        self.reason = REASONS[signum]
        self.asked.set()
        raise self.reason

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.reason = REASONS[signum]
        is_urgent = self.is_asked or not self._grace_s
        # First: where an exception is swallowed, as in a destructor, the run ends by this.
        self.asked.set()
        if is_urgent:
            self._insist()
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._insist)
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        name = "Interrupted" if self.reason is KeyboardInterrupt else "Terminated"
        told = (
            f"{name}: finishing what is in flight, for {duration(self._grace_s)} at most; "
            "a second signal stops at once\n"
        )
        # Not through a stream, which may be in the midst of writing. A progress line has no end.
        with contextlib.suppress(OSError):
            os.write(STDERR, (f"\n{told}" if os.isatty(STDERR) else told).encode())

    def _insist(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise self.reason

    def __enter__(self) -> Self:
        self._handle_by(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handle in self._before.items():
            signal.signal(signum, handle)
