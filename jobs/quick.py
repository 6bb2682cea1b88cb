"""Specs for one line of the command line: a source, some questions, an output.

Knows names, not stores: the format is guessed from the path, and from local folders only.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from jobs.load import absolute
from schemas.ask import ROW_QUESTIONS
from schemas.errors import SpecError

CAPTION_PROMPT = "Describe the image."
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
    one question more, in any order, asks only that one; where words are shared, a hash tells the
    questions apart."""
    stems = {question: _stem(question) for question in questions}
    sharing = Counter(stems.values())
    return [
        {"id": stem if sharing[stem] == 1 else f"{stem}-{_hash(question)}", "prompt": question}
        for question, stem in stems.items()
    ]


def _stem(question: str) -> str:
    stem = "-".join(re.findall(r"\w+", question.lower()))[:MAX_ID_CHARACTERS].strip("-")
    return "question" if stem in {"", ROW_QUESTIONS} else stem


def _hash(question: str) -> str:
    return hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest()[:6]


def guess_format(source: str) -> str:
    """The format, from the name or from what a local folder holds.

    Raises SpecError where a name does not tell.
    """
    folder = absolute(source)
    # os.path takes a name that is too long for one that is not there, pathlib raises.
    if os.path.isdir(folder):
        return _format_of_folder(folder)
    name = _first_name(source)
    if known := _format_of(name):
        return known
    if Path(name).suffix:
        return "images"
    if "{" in source:
        return "webdataset"
    if "://" in source:
        raise SpecError(
            f"{source}: the name does not tell what it holds; add --format webdataset, parquet, "
            "manifest or images"
        )
    return "images"


def _first_name(source: str) -> str:
    """The last component of the first path that the braces stand for."""
    try:
        return Path(next(iter(braceexpand(source, escape=False)))).name.lower()
    except ValueError:
        return Path(source).name.lower()


def _format_of_folder(folder: str) -> str:
    """By the first folder that holds files; a manifest beside other files is taken for a note."""
    for _, _, files in os.walk(folder):
        if files:
            found = {_format_of(name) or "images" for name in files}
            return next(
                kind for kind in ("webdataset", "parquet", "images", "manifest") if kind in found
            )
    return "images"


def _format_of(name: str) -> str | None:
    # Imported here: pyarrow and fsspec, which a spec whose format is given does not need.
    from pipeline.sources import manifest, parquet, webdataset
    from pipeline.storage import has_suffix

    kinds = {
        "webdataset": webdataset.SHARD_SUFFIXES,
        "parquet": parquet.SUFFIXES,
        "manifest": manifest.SUFFIXES,
    }
    return next((kind for kind, suffixes in kinds.items() if has_suffix(name, suffixes)), None)
