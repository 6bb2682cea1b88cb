"""Draws what the embedded model took for what, as a picture of two tables.

    python -m benchmarks.easy_vqa > figures.json
    python -m tools.draw_confusions figures.json pipeline/embedded/confusions.png

Rows are what was asked for, columns what was answered: exact answers to easy-VQA's questions about
the colour and about the shape.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.shapes import COLOURS, SHAPES

Counts = Mapping[str, Mapping[str, int]]
"""How often each answer was given, by the right one."""

CELL_PX = (76, 40)
LABEL_PX = 96
HEADING_PX = 76
GAP_PX = 32
TEXT_PX = 16
PAPER = (255, 255, 255)
INK = (32, 32, 32)
FAINT = (176, 176, 176)
RIGHT = (46, 125, 50)
WRONG = (198, 40, 40)
OTHER = "other"


def table(title: str, counts: Counts, names: Sequence[str]) -> Image.Image:
    """One confusion matrix; answers that are none of the names share the last column."""
    columns = [*names, OTHER]
    width, height = CELL_PX
    font = ImageFont.load_default(TEXT_PX)
    total = sum(sum(given.values()) for given in counts.values())
    right = sum(counts.get(name, {}).get(name, 0) for name in names)
    heading = f"{title}: {right:,} of {total:,} right"
    wide = max(LABEL_PX + width * len(columns), round(font.getlength(heading)))
    image = Image.new("RGB", (wide + 1, HEADING_PX + height * len(names) + 1), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((0, 0), heading, INK, font=font)
    for column, name in enumerate(columns):
        middle = LABEL_PX + width * column + width // 2
        pen.text((middle, HEADING_PX - 12), name, INK, font=font, anchor="ms")
    for row, name in enumerate(names):
        top = HEADING_PX + height * row
        pen.text((LABEL_PX - 10, top + height // 2), name, INK, font=font, anchor="rm")
        given = counts.get(name, {})
        cells = [given.get(column, 0) for column in names]
        cells.append(sum(given.values()) - sum(cells))
        for column, count in enumerate(cells):
            place = (LABEL_PX + width * column, top)
            share = count / max(1, sum(cells))
            draw_cell(pen, place, count, shade(RIGHT if column == row else WRONG, share))
    return image


def draw_cell(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], count: int, colour: tuple[int, int, int]
) -> None:
    """A count on its colour; the eye passes over zeros."""
    (left, top), (width, height) = place, CELL_PX
    pen.rectangle((left, top, left + width, top + height), colour, outline=FAINT)
    ink = FAINT if count == 0 else PAPER if sum(colour) < 3 * 128 else INK
    font = ImageFont.load_default(TEXT_PX)
    pen.text((left + width // 2, top + height // 2), str(count), ink, font=font, anchor="mm")


def shade(hue: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """From paper at 0 to the hue at 1; a single count in a hundred is already seen."""
    strength = 0.0 if share == 0 else 0.2 + 0.8 * share
    red, green, blue = (round(255 + (value - 255) * strength) for value in hue)
    return red, green, blue


def picture(confusions: Mapping[str, Counts]) -> Image.Image:
    """Both tables, one above the other, on a margin."""
    tables = [
        table("Which colour? (rows: right, columns: answered)", confusions["colour"], [*COLOURS]),
        table("Which shape? (rows: right, columns: answered)", confusions["shape"], SHAPES),
    ]
    width = max(each.width for each in tables) + 2 * GAP_PX
    height = sum(each.height + GAP_PX for each in tables) + GAP_PX
    image = Image.new("RGB", (width, height), PAPER)
    top = GAP_PX
    for each in tables:
        image.paste(each, (GAP_PX, top))
        top += each.height + GAP_PX
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figures", type=Path, help="what benchmarks.easy_vqa printed")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    confusions = json.loads(options.figures.read_text())["confusions"]
    picture(confusions).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
