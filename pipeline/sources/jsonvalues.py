"""Values of JSON: read with some care, and written as the answer table takes them."""

import json
import math
from collections.abc import Iterable
from typing import Any

from pipeline.sources.base import valid_text

MOST_DEPTH = 100
"""Lists and objects inside of each other. What is done with values takes the stack at each level,
and how much of it there is depends on who asks."""

# NaN and Infinity are no JSON, but Python writes them for missing numbers.
DECODER = json.JSONDecoder(parse_constant=lambda _: None)


def parsed(text: str) -> Any:
    """The value that a text holds; raises ValueError where it holds none, or one too deep."""
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise too_deep() from None
    if is_too_deep(value):
        raise too_deep()
    return value


def too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def is_too_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable[object]:
    """What may hold more, in a list or an object."""
    values: Iterable[object] = value.values() if isinstance(value, dict) else ()
    if isinstance(value, list):
        values = value
    return [each for each in values if isinstance(each, list | dict)]


def json_text(value: object) -> str | None:
    """The value as JSON text; None for null. What no JSON can hold (1e999) becomes null in it."""
    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False)
    return valid_text(text)


def label(value: object, *, default: str) -> str:
    """A value as a name, text as it is; the default where there is none."""
    if value is None:
        value = default
    return valid_text(value) if isinstance(value, str) else json_text(value) or ""


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value
