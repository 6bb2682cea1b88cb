"""Runs in sessions of their own, and SIGKILL for all of their processes or for one."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from schemas.job import JobSpec
from tests.kills import Orders

REPOSITORY = Path(__file__).parents[1]
WORKERS = ("ray::MapWorker", "ray::_map_task", "ray::_write", "ray::_Keeper", "ray::IDLE")
"""How the titles of processes begin that work for a job, or are about to."""


class LiveRun:
    """`lavaflow run SPEC`, in a session of its own; under orders, where there are any."""

    def __init__(self, spec: Path, orders: Orders | None = None) -> None:
        # Ray's sockets lie below this folder, and the path of a socket has to be short.
        self._folder = tempfile.mkdtemp(prefix="lf-k-", dir="/tmp")
        environment = {**os.environ, "RAY_TMPDIR": self._folder}
        if orders:
            environment |= orders.to_environment()
        command = Path(sys.executable).with_name("lavaflow")
        self._said = Path(self._folder, "said")
        self.started_at = time.time()
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [str(command), "run", str(spec)],
                cwd=REPOSITORY,
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait(self, timeout_s: float = 240) -> tuple[int, str]:
        """Its exit status and all that it said."""
        status = self.process.wait(timeout_s)
        return status, self.said

    @property
    def said(self) -> str:
        return self._said.read_text()

    def kill(self) -> None:
        """SIGKILL the driver and every process of Ray, in any order, until none is left."""
        end = time.monotonic() + 10
        while there := processes_of_session(self.process.pid):
            assert time.monotonic() < end, f"these live on: {there}"
            random.shuffle(there)
            for pid in there:
                kill(pid)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers_of(run: LiveRun) -> list[int]:
    """The processes of a run that work for the job: its actors and tasks, not Ray's own."""
    titles = {pid: title_of(pid) for pid in processes_of_session(run.process.pid)}
    return [pid for pid, title in titles.items() if any(name in title for name in WORKERS)]


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def processes_of_session(session: int) -> list[int]:
    """The processes of a session that are not over (zombies are)."""
    return [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := _fields_of(stat)) and fields[0] != "Z" and int(fields[3]) == session
    ]


def _fields_of(stat: Path) -> list[str]:
    """State, parent, group, session, ...: what follows the name, which may hold anything."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def write_spec(job: JobSpec, path: Path) -> Path:
    path.write_text(job.model_dump_json(by_alias=True, exclude_defaults=True))
    return path
