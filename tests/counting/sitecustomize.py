"""A decoder for Pillow that notes each image that it decodes: `COUNTED:LOG` and a PNG.

With this folder on PYTHONPATH, every new Python process has it.
"""

import io
from typing import Any

from PIL import Image, ImageFile

MARK = b"COUNTED:"


class CountedImageFile(ImageFile.ImageFile):
    format = "COUNTED"

    def _open(self) -> None:
        assert self.fp is not None
        head, _, self._png = self.fp.read().partition(b"\n")
        self._log = head.removeprefix(MARK).decode()
        with Image.open(io.BytesIO(self._png)) as image:
            self._mode, self._size = "RGB", image.size

    def load(self) -> Any:
        if self._im is None:
            with open(self._log, "a", encoding="utf-8") as log:
                log.write("decoded\n")
            self.im = Image.open(io.BytesIO(self._png)).convert("RGB").im
        return Image.Image.load(self)


Image.register_open("COUNTED", CountedImageFile, lambda prefix: prefix.startswith(MARK))
