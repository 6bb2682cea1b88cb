"""What `doctor` says of a checkpoint, one thing at a time."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "mended", "note", "unknown", "wrong"]


@dataclass(frozen=True)
class Finding:
    """`state`: mended, where Lavaflow sets right what a file says; note, where something is worth
    knowing; unknown, where it could not be tried; wrong, where answers would fail or be wrong."""

    about: str
    state: State
    text: str
