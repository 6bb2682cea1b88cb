"""Who holds an output, as its lease file says it, and whether that process still lives.

A pid means the same process only on the same machine, since the same boot, in the same pid
namespace, and while the process has the same start time.
"""

import contextlib
import os
import socket
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

_ours: set[str] = set()
"""The tokens that this process has made and not given up."""


class Holder(BaseModel):
    """What a lease file says of the run that wrote it."""

    model_config = ConfigDict(frozen=True)

    number: int
    run_id: str
    token: str
    host: str
    boot_id: str | None
    pid: int = Field(gt=0, lt=2**31)
    pid_start: int | None
    pid_namespace: str | None
    since: str
    beat: int
    timeout_s: float = Field(gt=0, allow_inf_nan=False)
    released: str | None

    def __str__(self) -> str:
        return f"run {self.run_id} on {self.host} (pid {self.pid}, since {self.since})"

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can tell if it lives."""
        machine = (self.host, self.boot_id, self.pid_namespace)
        return machine == _machine() and None not in machine

    def lives(self) -> bool:
        """Whether a holder that `is_here` is still running and has not given the lease up."""
        if self.pid == os.getpid() and self.token not in _ours:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        state, start = _process(self.pid)
        is_reused = None not in (start, self.pid_start) and start != self.pid_start
        return state not in ("Z", "X") and not is_reused


def ourselves(number: int, *, run_id: str, timeout_s: float) -> Holder:
    """This process as a holder; it counts as living until it is forgotten."""
    host, boot_id, pid_namespace = _machine()
    token = uuid.uuid4().hex
    _ours.add(token)
    return Holder(
        number=number,
        run_id=run_id,
        token=token,
        host=host,
        boot_id=boot_id,
        pid=os.getpid(),
        pid_start=_process(os.getpid())[1],
        pid_namespace=pid_namespace,
        since=now(),
        beat=0,
        timeout_s=timeout_s,
        released=None,
    )


def forget(holder: Holder) -> None:
    """The lease is given up, or was never had."""
    _ours.discard(holder.token)


def _machine() -> tuple[str, str | None, str | None]:
    """Host, boot and pid namespace: where they are the same, a pid means the same process."""
    boot_id = pid_namespace = None
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot_id, pid_namespace


def _process(pid: int) -> tuple[str, int | None]:
    """Its state and start time from /proc/PID/stat (proc(5)); ("", None) where that is hidden."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", None
    return fields[0].decode(), int(fields[19])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
