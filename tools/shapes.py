"""Draws images of one coloured shape: the only pictures the embedded model knows.

The family is easy-VQA's: a circle, rectangle or upright triangle in one of eight pure colours on a
very light background. Sizes are in pixels of a 64-pixel image, whatever the side drawn.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

SIDE_PX = 64
SHAPES = ("circle", "rectangle", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "brown": (165, 42, 42),
}
RESAMPLINGS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
UPSCALINGS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
)


@dataclass(frozen=True)
class Scene:
    """One shape: its box is (left, top, width, height) in units of a 64-pixel image.

    `flattened` is how far a circle bulges out of its box, where it is cut: easy-VQA's circles have
    short flat sides.
    """

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    background: tuple[int, int, int]
    flattened: float = 0.0


def random_scene(rng: random.Random, *, largest_px: float = 40.0) -> Scene:
    """A scene with small shapes over-represented: they are the ones hard to tell apart."""
    shape = rng.choice(SHAPES)
    width = rng.uniform(8, 16) if rng.random() < 0.5 else rng.uniform(9, largest_px)
    height = width
    if shape == "triangle":
        height = width * 0.866
    elif shape == "rectangle" and rng.random() < 0.7:
        height = rng.uniform(8, 16) if rng.random() < 0.4 else rng.uniform(9, largest_px)
    return Scene(
        shape=shape,
        colour=rng.choice(tuple(COLOURS)),
        box=(rng.uniform(0, SIDE_PX - width), rng.uniform(0, SIDE_PX - height), width, height),
        background=(rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255)),
        flattened=rng.uniform(0, 0.7) if shape == "circle" and rng.random() < 0.7 else 0.0,
    )


def draw(
    scene: Scene,
    *,
    side_px: int = SIDE_PX,
    supersample: int = 4,
    resampling: Image.Resampling = Image.Resampling.BOX,
) -> Image.Image:
    """The scene as an anti-aliased RGB image of `side_px` x `side_px`."""
    image = Image.new("RGB", (side_px, side_px), scene.background)
    image.paste(
        COLOURS[scene.colour],
        mask=draw_mask(scene, side_px=side_px, supersample=supersample, resampling=resampling),
    )
    return image


def draw_mask(
    scene: Scene, *, side_px: int, supersample: int, resampling: Image.Resampling
) -> Image.Image:
    """How much of each pixel the shape covers, as an 8-bit image."""
    scale = side_px * supersample / SIDE_PX
    left, top, width, height = scene.box
    x0, y0 = left * scale, top * scale
    x1, y1 = (left + width) * scale - 1, (top + height) * scale - 1
    large = Image.new("L", (side_px * supersample, side_px * supersample), 0)
    pen = ImageDraw.Draw(large)
    if scene.shape == "circle":
        bulge = scene.flattened * scale
        pen.ellipse((x0 - bulge, y0 - bulge, x1 + bulge, y1 + bulge), fill=255)
        box = tuple(round(edge) for edge in (x0, y0, x1 + 1, y1 + 1))
        inside, large = large.crop(box), Image.new("L", large.size, 0)
        large.paste(inside, box)
    elif scene.shape == "rectangle":
        pen.rectangle((x0, y0, x1, y1), fill=255)
    else:
        pen.polygon([((x0 + x1) / 2, y0), (x0, y1), (x1, y1)], fill=255)
    return large.resize((side_px, side_px), resampling)


def draw_at_random(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene at 64 pixels, its edges smoothed in one of several ways."""
    return draw(scene, supersample=rng.choice((2, 2, 4)), resampling=rng.choice(RESAMPLINGS))


def background_of(image: Image.Image) -> tuple[int, int, int]:
    """The commonest colour on the border: no shape covers half of it."""
    width, height = image.size
    edges = ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height))
    counts: Counter[tuple[int, int, int]] = Counter()
    for edge in edges:
        for count, colour in image.crop(edge).getcolors():
            counts[colour] += count
    return counts.most_common(1)[0][0]


def moved(image: Image.Image, rng: random.Random, *, can_turn: bool) -> Image.Image:
    """The image mirrored, turned upside down or on its side where it may be, and shifted.

    A shift never cuts the shape.
    """
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if can_turn and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.ROTATE_90)
    background = background_of(image)
    empty = Image.new("RGB", image.size, background)
    box = ImageChops.difference(image, empty).getbbox()
    if box is None or rng.random() < 0.25:
        return image
    left, top, right, bottom = box
    place = (rng.randint(0, SIDE_PX - right + left), rng.randint(0, SIDE_PX - bottom + top))
    empty.paste(image.crop(box), place)
    return empty


def disturb(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image as it may arrive: often untouched, else enlarged, JPEG-compressed, or both.

    An enlarged image is brought back to 64 pixels as CLIP's image processor does it.
    """
    dice = rng.random()
    if dice < 0.65:
        return image
    if dice < 0.87:
        side_px = rng.choice((96, 128, 192, 224, 256, 256, 512))
        image = image.resize((side_px, side_px), rng.choice(UPSCALINGS))
    if dice > 0.77:
        image = jpeg(image, quality=rng.randint(60, 95))
    if image.width != SIDE_PX:
        image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return image


def jpeg(image: Image.Image, *, quality: int) -> Image.Image:
    """The image after a round trip through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
