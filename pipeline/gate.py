"""The gate that the stages ask before they begin: how a run that was told to stop ends soon.

    open      every call enters
    closed    what is inside finishes, and nothing new begins

A tiny actor holds it, since the stages run on other machines. One that cannot be asked counts as
open: an answer too many costs less than a job that ends by mistake.
"""

import ray

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

    def enter(self, stage: str) -> bool:
        """Whether a call of the stage may begin. If so, it has to `leave`."""
        try:
            return bool(ray.get(self._keeper.enter.remote(stage)))
        except ray.exceptions.RayError:
            return True

    def leave(self, stage: str, *, rows: int) -> None:
        """A call is over, which has made this many rows."""
        self._keeper.leave.remote(stage, rows)

    def rows_after_close(self, stage: str) -> int | None:
        """Close the gate; the rows that the stage has made, or None while a call is inside."""
        try:
            rows: int | None = ray.get(self._keeper.close.remote(stage), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return rows


class _Keeper:
    """The actor's side."""

    def __init__(self) -> None:
        self._is_open = True
        self._inside: dict[str, int] = {}
        self._rows: dict[str, int] = {}

    def is_open(self) -> bool:
        return self._is_open

    def enter(self, stage: str) -> bool:
        if self._is_open:
            self._inside[stage] = self._inside.get(stage, 0) + 1
        return self._is_open

    def leave(self, stage: str, rows: int) -> None:
        self._inside[stage] = self._inside.get(stage, 0) - 1
        self._rows[stage] = self._rows.get(stage, 0) + rows

    def close(self, stage: str) -> int | None:
        self._is_open = False
        return None if self._inside.get(stage, 0) > 0 else self._rows.get(stage, 0)
