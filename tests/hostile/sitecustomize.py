"""A decoder for Pillow that does to its process what the bytes tell it.

With this folder on PYTHONPATH, every new Python process has it: `HOSTILE:segv` is an image.
"""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

MARK = b"HOSTILE:"


class SurpriseError(Exception):
    """Nothing that anybody expects of a decoder."""


def segv(_: str) -> None:
    ctypes.string_at(0)


def leave(status: str) -> None:
    os._exit(int(status))


def end_by(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


def hang(_: str) -> None:
    time.sleep(600)


def spin(_: str) -> None:
    while True:
        pass


def eat(_: str) -> None:
    eaten = []
    while True:
        eaten.append(bytearray(2**24))


def talk(_: str) -> None:
    os.write(1, b"printed by a decoder")
    os.write(2, b"complained by a decoder")


def surprise(text: str) -> None:
    raise SurpriseError(text)


def die_once(mark: str) -> None:
    if not Path(mark).exists():
        Path(mark).touch()
        end_by("SIGSEGV")


DEEDS = {
    "segv": segv,
    "leave": leave,
    "end_by": end_by,
    "hang": hang,
    "spin": spin,
    "eat": eat,
    "talk": talk,
    "surprise": surprise,
    "die_once": die_once,
}


class HostileImageFile(ImageFile.ImageFile):
    format = "HOSTILE"

    def _open(self) -> None:
        assert self.fp is not None
        _, self._deed, self._about = (self.fp.read() + b":").decode().split(":", 2)
        self._mode, self._size = "RGB", (8, 8)

    def load(self) -> Any:
        if self._im is None:
            DEEDS[self._deed](self._about.rstrip(":"))
            self.im = Image.core.fill("RGB", self.size, (255, 0, 0))
        return Image.Image.load(self)


Image.register_open("HOSTILE", HostileImageFile, lambda prefix: prefix.startswith(MARK))
