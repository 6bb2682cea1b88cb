"""Values of JSON as the answer table takes them: kept columns as text, labels of rows."""

import json
import math

from pipeline.sources.base import valid_text


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
