"""The process in which images are decoded and resized, one after the other.

It belongs to a `Decoder`, which starts it, and ends with it. Decoders are C code that reads what
strangers wrote: what one does to this process, a crash, a hang, an allocation without end, costs
one image. Imports Pillow and numpy and little else, so that it starts in a fraction of a second.

A message is its length, then its bytes. To it: its settings, pickled, then one message an image.
From it: an empty message when it is ready, then for each image a JSON object and the pixels, which
are an empty message where the object tells an error.
"""

import contextlib
import ctypes
import functools
import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import AvifImagePlugin

from pipeline.decode import decode_picture, known_formats, no_memory
from pipeline.engine.pixels import AnyResize, Resize
from schemas.errors import DecodeError, DecoderCrashed

FAST_FACTOR = 2.0
"""How many times as large as the resized image a JPEG stays that is decoded at a fraction."""

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class DecodeSettings:
    """What holds for every image.

    `is_fast`: JPEGs may be decoded at a fraction of their size. `memory_bytes`: on Linux, what
    decoding and resizing may take beside the image's file.
    """

    resize: AnyResize
    max_pixels: int
    max_bytes: int
    allow_truncated: bool
    is_fast: bool
    timeout_s: float
    memory_bytes: int


def main() -> None:
    requests, replies = _pipes()
    with contextlib.suppress(EOFError, BrokenPipeError):
        settings: DecodeSettings = pickle.loads(receive(requests))
        _be_a_good_child(settings)
        send(replies, b"")
        _silence()
        while True:
            said, pixels = _answer(receive(requests), settings)
            send(replies, json.dumps(said).encode())
            send(replies, pixels)


def send(file: IO[bytes], data: Any) -> None:
    """Write one message: anything that holds bytes in a row."""
    file.write(_LENGTH.pack(memoryview(data).nbytes))
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> bytes:
    """Read one message. Raises EOFError where the other side is gone."""
    (size,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
    return _exactly(file, size)


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes, and nothing more")
    return data


def _pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, out of the reach of decoders that print."""
    requests, replies = os.dup(0), os.dup(1)
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _silence() -> None:
    """From here on nobody reads what is written to stderr."""
    os.dup2(1, 2)


def _be_a_good_child(settings: DecodeSettings) -> None:
    known_formats()  # imports Pillow's decoders
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner to act upon
    if sys.platform == "linux":
        # The owner's end closes the pipe, which a decoder at work does not notice.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        _limit_memory(settings.memory_bytes + settings.max_bytes)


def _limit_memory(more_bytes: int) -> None:
    """Refuse this process more than so much memory beyond what it has, and core dumps."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + more_bytes
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _answer(data: bytes, settings: DecodeSettings) -> tuple[dict[str, Any], bytes]:
    try:
        with _alarm(settings.timeout_s):
            return _decoded(data, settings)
    except MemoryError:
        return _told(no_memory()), b""
    except DecodeError as error:
        return _told(error), b""
    except Exception as error:  # noqa: BLE001 (what nobody has foreseen costs this image only)
        return _told(DecoderCrashed(f"decoding it ended in {type(error).__name__}: {error}")), b""


def _told(error: DecodeError) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _decoded(data: bytes, settings: DecodeSettings) -> tuple[dict[str, Any], bytes]:
    resize, enough = settings.resize, None
    if settings.is_fast and isinstance(resize, Resize):
        enough = functools.partial(resize.enough, factor=FAST_FACTOR)
    picture = decode_picture(
        data,
        max_pixels=settings.max_pixels,
        allow_truncated=settings.allow_truncated,
        enough=enough,
    )
    resize.check(picture.size, max_pixels=settings.max_pixels)
    pixels = np.asarray(resize(picture.image))
    return {"size": picture.size, "shape": pixels.shape}, pixels.tobytes()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process, whatever it is doing, if the block takes longer than so many seconds."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
