"""Draws the packaged demo samples: two webdataset shards of shapes, each with two questions.

    python -m tools.make_samples pipeline/embedded/samples

The bytes are the same on every run with the same Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from pathlib import Path

from PIL import Image

from tools.questions import ask
from tools.shapes import COLOURS, SHAPES, Scene, draw

SHARDS = 2
IMAGES_A_SHARD = 24
SIDES_PX = (192, 224, 256, 256, 320)
SEED = 7


def sample_scene(number: int, rng: random.Random) -> Scene:
    """A scene large enough to please the eye; 24 in a row hold every colour and shape pair."""
    shape = SHAPES[number % len(SHAPES)]
    width = height = rng.uniform(14, 36)
    if shape == "triangle":
        height = width * 0.866
    elif shape == "rectangle":
        height = rng.uniform(14, 36)
    return Scene(
        shape=shape,
        colour=tuple(COLOURS)[number // len(SHAPES) % len(COLOURS)],
        box=(rng.uniform(1, 63 - width), rng.uniform(1, 63 - height), width, height),
        background=(rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255)),
    )


def sample_members(number: int) -> list[tuple[str, bytes]]:
    """The image and the JSON of one sample, as (file name, bytes)."""
    rng = random.Random(f"{SEED}/{number}")
    scene = sample_scene(number, rng)
    kinds = rng.sample(("presence", "absence", "colour", "shape"), 2)
    questions = [ask(kind, colour=scene.colour, shape=scene.shape, rng=rng) for kind in kinds]
    image = draw(scene, side_px=rng.choice(SIDES_PX), supersample=2)
    extension = "png" if number % 5 < 2 else "jpg"
    description = {
        "questions": [
            {"id": f"q{index}", "question": question} for index, question in enumerate(questions)
        ],
        "colour": scene.colour,
        "shape": scene.shape,
    }
    return [
        (f"{number:06d}.{extension}", encoded(image, extension)),
        (f"{number:06d}.json", json.dumps(description).encode()),
    ]


def encoded(image: Image.Image, extension: str) -> bytes:
    """The image's file."""
    buffer = io.BytesIO()
    if extension == "png":
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, numbers: range) -> None:
    """One tar of samples, free of times and owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number in numbers:
            for name, content in sample_members(number):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                entry.mode = 0o644
                shard.addfile(entry, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        first = shard * IMAGES_A_SHARD
        path = options.folder / f"shapes-{shard:05d}.tar"
        write_shard(path, range(first, first + IMAGES_A_SHARD))


if __name__ == "__main__":
    main()
