"""What is secret in a URL (user, password, query) is neither told nor written down.

Credentials come from the environment and are nowhere else; but a presigned URL is one, too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.sources.uris import shown
from schemas.job import JobSpec

URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
PLACES = (
    ("source", "path"),
    ("source", "image_root"),
    ("source", "storage", "endpoint_url"),
    ("model", "storage", "endpoint_url"),
    ("output", "path"),
    ("output", "storage", "endpoint_url"),
)
"""Keys of a spec that hold URLs; what else looks like one is a part of a text."""


def without_secrets(text: str) -> str:
    """The text with its URLs as people may see them."""
    return URL.sub(lambda url: shown(url[0]), text)


def recorded(job: JobSpec) -> tuple[dict[str, Any], list[str]]:
    """The spec as it may be written down, without defaults, and the keys that lack something."""
    spec = job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    withheld = []
    for *path, key in PLACES:
        inside: Any = spec
        for name in path:
            inside = inside.get(name, {})
        if inside.get(key) != (told := _told(inside.get(key))):
            inside[key] = told
            withheld.append(".".join((*path, key)))
    return spec, withheld


def told_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything else of a run record as it may be written down."""
    return {key: value if key == "spec" else _told(value) for key, value in record.items()}


def _told(value: Any) -> Any:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_told(each) for each in value]
    return value
