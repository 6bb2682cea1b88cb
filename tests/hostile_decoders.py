"""Images whose decoders end, block or fill their process, and what shows how processes fare."""

import os
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).with_name("hostile")


def path_with_hostile_decoders() -> str:
    """A PYTHONPATH for the processes that are to have `hostile/sitecustomize.py`."""
    return os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))


def hostile(deed: str) -> bytes:
    """An image that does something to the process that decodes it: see DEEDS there."""
    return b"HOSTILE:" + deed.encode()


def children_of(pid: int) -> list[int]:
    """The processes that this one has started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone since
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
