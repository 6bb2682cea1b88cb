"""Images decoded and resized in a process of their own, which a bad one may take down.

The process is started once and serves image after image (`decode_process.py`). If it dies, the
image that it was at work on is tried once more, alone, in a new one: it may have died of the image
before, or been ended by somebody. If it dies again, that image is to blame.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Self

import numpy as np

from pipeline.decode_process import DecodeSettings, receive, send
from pipeline.engine.pixels import AnyResize
from schemas.errors import DecodeError, DecoderCrashed, DecoderTimedOut, ImageTooLarge, JobError
from schemas.job import JobSpec

TRIES = 2
BURIAL_S = 1.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pipeline.decode_process import main; main()"
)
"""The owner's path, whatever it is: Ray's workers have folders on it that nothing else tells."""

_ERRORS = {kind.__name__: kind for kind in DecodeError.__subclasses__()}


@dataclass(frozen=True)
class Decoded:
    """`pixels`: uint8 of `shape` row-major, resized: [H, W, 3] or [tiles, H, W, 3]. `width`,
    `height`: of the whole image."""

    pixels: bytes
    shape: tuple[int, ...]
    width: int
    height: int

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.pixels, np.uint8).reshape(self.shape)


def settings_of(job: JobSpec, resize: AnyResize) -> DecodeSettings:
    """How the images of a job are decoded."""
    return DecodeSettings(
        resize=resize,
        max_pixels=job.source.max_image_pixels,
        max_bytes=job.source.max_image_bytes,
        allow_truncated=job.source.allow_truncated,
        is_fast=job.source.decode == "fast",
        timeout_s=job.resources.preprocess.decode_timeout_s,
        memory_bytes=job.resources.preprocess.decode_memory_bytes,
    )


class Decoder:
    """Decodes one image at a time, in the order in which they come, beside whoever asks for it."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._max_bytes = settings.max_bytes
        self._process = process = _Process(settings)
        # One thread for the process's whole life: on Linux it ends with the thread that started it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lavaflow-decoder")
        self._thread.submit(process.start)
        self._end = weakref.finalize(self, process.end)

    def submit(self, data: bytes | memoryview) -> "Future[Decoded]":
        """Have an image decoded; asking for the result raises DecodeError where it cannot be.

        It raises JobError where the process cannot be started at all.
        """
        if (size := memoryview(data).nbytes) > self._max_bytes:
            refused: Future[Decoded] = Future()
            refused.set_exception(
                ImageTooLarge(
                    f"the image has {size} bytes, more than the {self._max_bytes} of "
                    "source.max_image_bytes; raise it to decode this image"
                )
            )
            return refused
        return self._thread.submit(self._process.decode, data)

    def close(self) -> None:
        """End the process; what is not decoded yet is cancelled."""
        self._end()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """The process, while there is one. Used by the Decoder's thread, but for `end`."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._is_over = False

    def decode(self, data: bytes | memoryview) -> Decoded:
        for _ in range(TRIES):
            process = self.start()
            try:
                return self._ask(process, data)
            except (EOFError, OSError, ValueError):
                code = self._bury(process)
            if self._is_over or _name_of(code) == "SIGALRM":
                break
        raise self._blamed(code, memoryview(data))

    def start(self) -> "subprocess.Popen[bytes]":
        """The process, ready for an image."""
        if self._process is None and not self._is_over:
            self._process = self._started()
        # It may have been over while the process was being started.
        if self._is_over or self._process is None:
            self.end()
            raise JobError("the process that decodes images was ended by its owner")
        return self._process

    def end(self) -> None:
        """Ends the process, whatever it is doing; there will be no other."""
        self._is_over = True
        if (process := self._process) is not None:
            process.kill()
            self._bury(process)

    def _started(self) -> "subprocess.Popen[bytes]":
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **dict.fromkeys(_THREADS, "1")},
            )
        except OSError as error:
            raise JobError(f"the process that decodes images does not start: {error}") from error
        requests, replies, complaints = _pipes(process)
        try:
            send(requests, pickle.dumps(self._settings))
            receive(replies)
        except (EOFError, OSError) as error:
            said = complaints.read().decode(errors="replace").strip()
            code = self._bury(process)
            raise JobError(
                f"the process that decodes images does not start (it ended with "
                f"{_name_of(code)}): {said or error}"
            ) from error
        complaints.close()
        return process

    def _ask(self, process: "subprocess.Popen[bytes]", data: bytes | memoryview) -> Decoded:
        requests, replies, _ = _pipes(process)
        send(requests, data)
        said = json.loads(receive(replies))
        pixels = receive(replies)
        if "error" in said:
            raise _ERRORS[said["error"]](said["message"])
        width, height = said["size"]
        return Decoded(pixels, tuple(said["shape"]), width, height)

    def _bury(self, process: "subprocess.Popen[bytes]") -> int:
        """Its exit status, once it is gone for certain."""
        self._process = None
        # Its pipes are closed a moment before its exit status is known.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=BURIAL_S)
        process.kill()
        for pipe in _pipes(process):
            with contextlib.suppress(OSError):
                pipe.close()
        return process.wait()

    def _blamed(self, code: int, data: memoryview) -> DecodeError:
        start = bytes(data[:8])
        if _name_of(code) == "SIGALRM":
            return DecoderTimedOut(
                f"decoding the image, which starts with the bytes {start!r}, took longer than "
                f"{self._settings.timeout_s:g} s; raise resources.preprocess.decode_timeout_s, or "
                "convert the image to another format"
            )
        return DecoderCrashed(
            f"decoding the image, which starts with the bytes {start!r}, ended the process "
            f"({_name_of(code)}), {TRIES} times; convert the image to another format"
        )


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """To it, from it, and its complaints."""
    requests, replies, complaints = process.stdin, process.stdout, process.stderr
    assert requests is not None
    assert replies is not None
    assert complaints is not None
    return requests, replies, complaints


def _name_of(code: int) -> str:
    """SIGSEGV, or `status 1`."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"status {code}"
    return f"signal {-code}"
