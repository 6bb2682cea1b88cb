"""What the stages of one run ask and tell the driver: whether to begin, what has failed, how long
they were at work.

    open      every call enters
    closed    what is inside finishes, and nothing new begins: a run that was told to stop ends soon

A tiny actor holds it, since the stages run on other machines. One that cannot be asked counts as
open: an answer too many costs less than a job that ends by mistake.
"""

from collections import Counter, defaultdict

import ray

from schemas.errors import StoreUnavailable

ANSWER_TIMEOUT_S = 1.0


class Gate:
    """A handle to the gate of one run; travels to the stages."""

    def __init__(self) -> None:
        # A gate that was restarted is open, and is closed again when it is asked what is inside.
        self._keeper = ray.remote(num_cpus=0, max_restarts=-1)(_Keeper).remote()

    def is_open(self) -> bool:
        try:
            return bool(ray.get(self._keeper.is_open.remote()))
        except ray.exceptions.RayError:
            return True

    def arrive(self, stage: str) -> None:
        """An actor of the stage has started, maybe again: none of its calls is inside."""
        self._keeper.arrive.remote(stage, _actor())

    def enter(self, stage: str) -> bool:
        """Whether a call of the stage may begin. If so, it has to `leave`."""
        try:
            return bool(ray.get(self._keeper.enter.remote(stage, _actor())))
        except ray.exceptions.RayError:
            return True

    def leave(self, stage: str, *, rows: int, seconds: float) -> None:
        """A call is over, which has made this many rows in this time."""
        self._keeper.leave.remote(stage, _actor(), rows)
        self.tell_time(stage, seconds)

    def tell_time(self, stage: str, seconds: float) -> None:
        """A worker of the stage has been at work for so long."""
        self._keeper.tell_time.remote(stage, seconds)

    def seconds(self) -> dict[str, float]:
        """How long each stage was at work, summed over its workers; none where nobody tells."""
        try:
            told: dict[str, float] = ray.get(
                self._keeper.seconds.remote(), timeout=ANSWER_TIMEOUT_S
            )
        except ray.exceptions.RayError:
            return {}
        return told

    def tell_failure(self, failure: StoreUnavailable) -> None:
        """A store has failed while a shard was read."""
        self._keeper.tell_failure.remote(str(failure))

    def failures(self) -> list[str]:
        """What was told; none where nobody can be asked."""
        try:
            told: list[str] = ray.get(self._keeper.failures.remote(), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return []
        return told

    def rows_after_close(self, stage: str) -> int | None:
        """Close the gate; the rows that the stage has made, or None while a call is inside."""
        try:
            rows: int | None = ray.get(self._keeper.close.remote(stage), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return rows


def _actor() -> str:
    """The id of this actor, which it keeps when it is restarted."""
    return str(ray.get_runtime_context().get_actor_id())


class _Keeper:
    """The actor's side."""

    def __init__(self) -> None:
        self._is_open = True
        self._inside: dict[str, Counter[str]] = defaultdict(Counter)
        self._rows: Counter[str] = Counter()
        self._failures: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def is_open(self) -> bool:
        return self._is_open

    def arrive(self, stage: str, actor: str) -> None:
        self._inside[stage][actor] = 0

    def enter(self, stage: str, actor: str) -> bool:
        self._inside[stage][actor] += self._is_open
        return self._is_open

    def leave(self, stage: str, actor: str, rows: int) -> None:
        self._inside[stage][actor] -= 1
        self._rows[stage] += rows

    def tell_time(self, stage: str, seconds: float) -> None:
        self._seconds[stage] += seconds

    def seconds(self) -> dict[str, float]:
        return dict(self._seconds)

    def tell_failure(self, failure: str) -> None:
        self._failures.append(failure)

    def failures(self) -> list[str]:
        return self._failures

    def close(self, stage: str) -> int | None:
        self._is_open = False
        is_anyone_inside = any(count > 0 for count in self._inside[stage].values())
        return None if is_anyone_inside else self._rows[stage]
