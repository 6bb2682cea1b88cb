"""One run per output: numbered lease files, of which the highest number holds.

    DST/lease/00000007.json     who holds the output, and a count that grows while it lives

1. A run looks who holds the output. Nobody, a lease that was released or a dead process of this
   machine: it goes on. A living process of this machine: it ends. A run on another machine is
   watched, and followed once its file has not changed for as long as that file says.
2. It creates the next number exclusively, looks again whether that is the highest, and only then
   removes the lower ones. A number is never given twice, so that a run that slept through its own
   end finds a higher one, whatever it does.
3. A thread renews the file, and sees a higher number. On leaving the file stays, as released.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import ValidationError

from pipeline.holder import Holder, forget, now, ourselves
from pipeline.storage import Output, store_errors
from schemas.errors import OutputHeld, SpecError

FOLDER = "lease"
NAME = re.compile(r"([0-9]{8,})\.json")
BEATS = 6
"""Signs of life that a holder gives in the time after which it counts as dead."""
LONGEST_BEAT_S = 30.0
POLLS = 20
LONGEST_POLL_S = 1.0
TRIES = 5
SETTLE_S = 1.0
"""How long a store that cannot create exclusively is left alone before it is asked who won."""
JOIN_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Seen:
    """The highest lease as it was read; number 0 where there is none."""

    number: int = 0
    raw: bytes = b""

    @property
    def holder(self) -> Holder | None:
        """None where the file makes no sense."""
        try:
            return Holder.model_validate_json(self.raw)
        except ValidationError:
            return None

    @property
    def is_free(self) -> bool:
        holder = self.holder
        if holder is None:
            return self.number == 0
        return holder.released is not None or (holder.is_here() and not holder.lives())

    def __str__(self) -> str:
        return str(self.holder or f"a run that {_name(self.number)} does not name")


class Lease:
    """One run per output: the highest number in DST/lease/ holds."""

    def __init__(self, output: Output, holder: Holder) -> None:
        self.number = holder.number
        self.is_exclusive = True
        self.lost: OutputHeld | None = None
        self._holder = holder
        self._output = output
        self._hasty = output.with_patience(0.0)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lavaflow-lease", daemon=True)

    def check(self) -> None:
        """Ask the store now, as patiently as the output does; raises OutputHeld when lost."""
        if self.lost is None:
            self._look(self._output)
        if self.lost is not None:
            raise self.lost

    def settle(self, say: Say) -> None:
        """Prove that nobody else can have created this number, and remove the lower ones."""
        if self._hasty.publish(_name(self.number), self._holder.to_bytes()):
            self.is_exclusive = False
            say(
                f"output.path {self._output.uri!r}: this store cannot create files exclusively; "
                "two runs that start together may not see each other: start one at a time"
            )
            time.sleep(SETTLE_S)
            if rival := self._rival(self._hasty):
                raise _held(self._output, rival)
        # The one just below may be gone; removing it shows early that the store forbids it.
        for number in {self.number - 1, *_numbers(self._hasty)}:
            if number < self.number:
                self._hasty.remove(_name(number))

    def start(self) -> None:
        self._heart.start()

    def release(self) -> None:
        """Give the lease up, as far as the store lets us; what is lost is left alone."""
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join(JOIN_S)
        forget(self._holder)
        if self._heart.is_alive() or self.lost is not None:
            return
        with contextlib.suppress(*_refusals()):
            if self._rival(self._hasty) is None:
                self._write(self._holder.model_copy(update={"released": now()}))

    def _beat(self) -> None:
        pause_s = min(self._holder.timeout_s / BEATS, LONGEST_BEAT_S)
        while self.lost is None and not self._ended.wait(pause_s):
            # What the store refuses now is tried again at the next beat.
            with contextlib.suppress(*_refusals()):
                self._renew()

    def _renew(self) -> None:
        self._look(self._hasty)
        if self.lost is None:
            self._write(self._holder.model_copy(update={"beat": self._holder.beat + 1}))

    def _write(self, holder: Holder) -> None:
        self._holder = holder
        self._hasty.replace(_name(self.number), holder.to_bytes())

    def _look(self, output: Output) -> None:
        if rival := self._rival(output):
            self.lost = OutputHeld(
                f"{rival} has taken the output {self._output.uri!r} over; this run stops; what it "
                "has answered is kept"
            )

    def _rival(self, output: Output) -> Seen | None:
        """Who else holds the output; one listing, where the store creates exclusively."""
        if self.is_exclusive and max(_numbers(output), default=0) <= self.number:
            return None
        seen = _highest(output)
        if seen.number != self.number:
            return seen if seen.number > self.number else None
        holder = seen.holder
        return None if holder and holder.token == self._holder.token else seen


@contextlib.contextmanager
def hold(output: Output, *, run_id: str, timeout_s: float, say: Say) -> Iterator[Lease]:
    """Hold the output while the block runs.

    Raises SpecError where it cannot be written, and OutputHeld where another run holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            holder = _take(output, run_id=run_id, timeout_s=timeout_s, say=say)
            lease = Lease(output, holder)
            stack.callback(lease.release)
            lease.settle(say)
        except _refusals() as error:
            raise SpecError(
                f"output.path {output.uri!r} cannot be written ({error}); "
                "check the path, its permissions and the credentials"
            ) from error
        lease.start()
        yield lease


def _take(output: Output, *, run_id: str, timeout_s: float, say: Say) -> Holder:
    """Create the number after the highest, once that is free. Raises OutputHeld."""
    hasty = output.with_patience(0.0)
    for _ in range(TRIES):
        free = _wait_until_free(output, _highest(hasty), timeout_s=timeout_s, say=say)
        ours = ourselves(free.number + 1, run_id=run_id, timeout_s=timeout_s)
        try:
            hasty.publish(_name(ours.number), ours.to_bytes())
            # Not what publish says: an upload that was tried again may meet its own first try.
            winner = _highest(hasty)
        except BaseException:
            forget(ours)
            raise
        if winner == Seen(ours.number, ours.to_bytes()):
            return ours
        if not winner.is_free:
            raise _held(output, winner)
    raise FileExistsError(f"{_name(ours.number)} is taken, by no lease that holds")


def _wait_until_free(output: Output, seen: Seen, *, timeout_s: float, say: Say) -> Seen:
    """The lease to follow: `seen`, or what took its place. Raises OutputHeld."""
    if seen.is_free:
        return seen
    holder = seen.holder
    if holder and holder.is_here():
        raise _held(output, seen)
    quiet_s = holder.timeout_s if holder else timeout_s
    say(
        f"output.path {output.uri!r} is held by {seen}; waiting up to {quiet_s:.0f} s for a sign "
        "of life"
    )
    after = _watch(output, seen, quiet_s=quiet_s)
    if after == seen or after.is_free:
        return after
    raise _held(output, after)


def _watch(output: Output, seen: Seen, *, quiet_s: float) -> Seen:
    """What is there once it is no longer `seen`, or has stayed `seen` for `quiet_s`."""
    watched_s, before = 0.0, time.monotonic()
    while watched_s < quiet_s:
        time.sleep(min(quiet_s / POLLS, LONGEST_POLL_S))
        after = _highest(output)
        if after != seen:
            return after
        now = time.monotonic()
        # While the store is out of reach, or this process is stopped, nobody watches.
        watched_s += min(now - before, quiet_s / BEATS)
        before = now
    return seen


def _held(output: Output, seen: Seen) -> OutputHeld:
    return OutputHeld(
        f"output.path {output.uri!r} is held by {seen}; let it end, or stop it; the same command "
        "goes on from there"
    )


def _highest(output: Output) -> Seen:
    number = 0
    for _ in range(TRIES):
        number = max(_numbers(output), default=0)
        if number == 0:
            return Seen()
        # A run that takes the output over removes this file once a higher one is there.
        with contextlib.suppress(FileNotFoundError):
            return Seen(number, output.read(_name(number)))
    return Seen(number)


def _refusals() -> tuple[type[Exception], ...]:
    """What a store raises, and ValueError for the names that it cannot have."""
    return (*store_errors(), ValueError)


def _numbers(output: Output) -> list[int]:
    names = (PurePosixPath(name).name for name in output.names(FOLDER, suffix=".json"))
    return [int(match[1]) for name in names if (match := NAME.fullmatch(name))]


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08}.json"
