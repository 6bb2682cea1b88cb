"""Real images and real tars for the tests, as small as they can be."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

RED = (255, 0, 0)


def image_bytes(
    kind: str = "PNG", *, size: tuple[int, int] = (8, 6), color: Any = RED, mode: str = "RGB"
) -> bytes:
    """An image of one colour in the format `kind`."""
    return saved(Image.new(mode, size, color), kind)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def tar_bytes(members: Iterable[tuple[str, bytes]], *, mode: str = "w") -> bytes:
    """A tar of these members in this order; `mode` as tarfile's (`w:gz`)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sample_members(n: int, *, columns: Mapping[str, Any] | None = None) -> list[tuple[str, bytes]]:
    """`n` samples `000`, `001`, ... of a PNG each, and a json member where there are columns."""
    members = []
    for number in range(n):
        members.append((f"{number:03}.png", image_bytes(color=(number, 0, 0))))
        if columns is not None:
            members.append((f"{number:03}.json", json_bytes(columns)))
    return members


def write_shard(path: Path, members: Iterable[tuple[str, bytes]], *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, mode=mode))
    return path
