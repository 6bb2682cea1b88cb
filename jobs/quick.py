"""Specs for one line of the command line: a source, some questions, an output.

Knows names, not stores: the format is guessed from the path, and from local folders only.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from jobs.load import absolute
from schemas.errors import SpecError
from schemas.job import ROW_QUESTIONS

CAPTION_PROMPT = "Describe the image."
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_ID_CHARACTERS = 60


def quick_spec(
    source: str,
    output: str,
    ask: Sequence[dict[str, str]],
    *,
    model: str | None,
    format: str | None,
) -> dict[str, Any]:
    """What a spec file would say."""
    return {
        "source": {"format": format or guess_format(source), "path": source},
        "ask": list(ask),
        **({"model": {"path": model}} if model else {}),
        "output": {"path": output},
    }


def caption_ask(prompt: str) -> list[dict[str, str]]:
    return [{"id": "caption", "prompt": prompt}]


def question_asks(questions: Sequence[str]) -> list[dict[str, str]]:
    """An entry of `ask` for each question. Its id comes from its words, so that the next run with
    one question more, in any order, asks only that one."""
    asks: dict[str, str] = {}
    for question in questions:
        stem = "-".join(re.findall(r"\w+", question.lower()))[:MAX_ID_CHARACTERS].strip("-")
        stem = "question" if stem in {"", ROW_QUESTIONS} else stem
        number, name = 1, stem
        while name in asks and asks[name] != question:
            number += 1
            name = f"{stem}-{number}"
        asks[name] = question
    return [{"id": name, "prompt": question} for name, question in asks.items()]


def guess_format(source: str) -> str:
    """`webdataset` or `images`, from the name or from what a local folder holds.

    Raises SpecError where a name does not tell.
    """
    folder = Path(absolute(source))
    if folder.is_dir():
        return "webdataset" if _holds_tars(folder) else "images"
    name = _first_name(source)
    if name.endswith(TAR_SUFFIXES):
        return "webdataset"
    if Path(name).suffix:
        return "images"
    if "{" in source:
        return "webdataset"
    if "://" in source:
        raise SpecError(
            f"{source}: the name does not tell whether these are tar shards or image files; "
            "add --format webdataset or --format images"
        )
    return "images"


def _first_name(source: str) -> str:
    """The last component of the first path that the braces stand for."""
    try:
        return Path(next(iter(braceexpand(source, escape=False)))).name.lower()
    except ValueError:
        return Path(source).name.lower()


def _holds_tars(folder: Path) -> bool:
    for _, _, files in os.walk(folder):
        if files:
            return any(file.lower().endswith(TAR_SUFFIXES) for file in files)
    return False
