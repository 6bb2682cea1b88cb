"""Images whose decoding is counted, in whatever process it happens."""

import os
from pathlib import Path

COUNTING = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("counting")), os.environ.get("PYTHONPATH")])
)
"""A PYTHONPATH for the processes that are to decode such images."""


def counted(png: bytes, *, log: Path) -> bytes:
    """An image like this one; its decodes are counted in `log`."""
    return b"COUNTED:" + os.fsencode(log) + b"\n" + png


def decodes(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0
