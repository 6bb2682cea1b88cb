"""Mistakes in a spec, told as the person who wrote it would find them.

Turns pydantic's errors into lines that name the key as written, the value and the remedy. Knows the
shape of `JobSpec`, not where a spec comes from.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from schemas.ask import ROW_QUESTIONS
from schemas.job import JobSpec

MAX_VALUE_CHARACTERS = 60

_WORDING = {
    "model_type": "a mapping of keys",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}


@dataclass(frozen=True)
class Place:
    """Where a mistake is: the key as written, and the keys that are known beside it."""

    key: str
    siblings: tuple[str, ...] = ()


def mistakes(error: ValidationError) -> list[str]:
    """One line for each mistake, in the order of the spec; what is in a key speaks for the key."""
    places: dict[str, list[str]] = {}
    for found in error.errors(include_url=False):
        place = place_of(found["loc"])
        says = places.setdefault(place.key, [])
        if (text := _say(place, found)) not in says:
            says.append(text)
    return [
        _line(key, says)
        for key, says in places.items()
        if not any(other.startswith(f"{key}.") for other in places)
    ]


def _line(key: str, says: Sequence[str]) -> str:
    """Members of a union complain one by one: what they want becomes one sentence."""
    if len(says) > 1 and all(" should be " in text for text in says):
        first, _, _ = says[0].partition(" should be ")
        wanted = " or ".join(text.partition(" should be ")[2] for text in says)
        return f"{key}: {first} should be {wanted}"
    return "; ".join(f"{key}: {text}" if key else text for text in says)


def _say(place: Place, found: Mapping[str, Any]) -> str:
    kind, value = found["type"], found["input"]
    if kind == "extra_forbidden":
        return f"unknown key (value {_short(value)}); {_remedy(place)}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(found["ctx"]["error"])
    if kind in _WORDING:
        return f"{_short(value)} should be {_WORDING[kind]}"
    message = str(found["msg"])
    if "should" in (words := message.split(" ", 2)):
        # After what pydantic calls the value: "Input should", "String should".
        message = " ".join(words[words.index("should") :])
    return f"{_short(value)} {message[:1].lower()}{message[1:]}{_closest(value, found)}"


def _closest(value: Any, found: Mapping[str, Any]) -> str:
    if "expected" not in (context := found.get("ctx", {})):
        return ""
    expected = str(context["expected"]).replace(" or ", ", ").split(", ")
    close = get_close_matches(str(value), [text.strip("'") for text in expected], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _remedy(place: Place) -> str:
    name = place.key.rpartition(".")[2]
    if name in place.siblings:
        # Known to the other kind of `ask`, the only key with two kinds of mapping.
        return f"{{from: {ROW_QUESTIONS}}} takes no {name}"
    if close := get_close_matches(name, place.siblings, n=1):
        return f"did you mean {close[0]}?"
    if elsewhere := [key for key in every_key() if key.rpartition(".")[2] == name]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known keys: {', '.join(place.siblings)}" if place.siblings else "drop it"


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[: MAX_VALUE_CHARACTERS - 3]}..."


def place_of(loc: Sequence[str | int]) -> Place:
    """The place that a pydantic location means, without the names of union members in it."""
    kind: Any = JobSpec
    key: list[str] = []
    siblings: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    for part in loc:
        members = _union(kind)
        if isinstance(part, int):
            key.append(str(part))
            kind = next((get_args(m)[0] for m in members if get_origin(m) is tuple), None)
        elif len(members) > 1:
            models = [m for m in map(_untagged, members) if _is_model(m)]
            beside = tuple(dict.fromkeys(name for m in models for name in _fields(m)))
            kind = next((_untagged(m) for m in members if part in _names(m)), None)
        else:
            key.append(part)
            fields = _fields(kind) if _is_model(kind) else {}
            siblings, beside = beside or tuple(fields), ()
            kind = fields.get(part)
    return Place(".".join(key), siblings)


def every_key() -> Iterator[str]:
    """Every key of a spec, with its dots, list entries left out."""
    yield from _keys_below(JobSpec, "")


def _keys_below(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, kind in _fields(model).items():
        yield prefix + name
        for member in map(_untagged, _union(kind)):
            if _is_model(member):
                yield from _keys_below(member, f"{prefix}{name}.")


def _fields(model: Any) -> dict[str, Any]:
    """The type of each key of a model, under the name that a spec writes."""
    return {f.alias or name: f.annotation for name, f in model.model_fields.items()}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _union(kind: Any) -> list[Any]:
    """The members of a union, null left out, each still with its tag; else the kind itself."""
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) in {Union, types.UnionType}:
        return _union(get_args(kind)[0])
    if get_origin(kind) in {Union, types.UnionType}:
        return [member for member in get_args(kind) if member is not type(None)]
    return [kind]


def _untagged(member: Any) -> Any:
    return get_args(member)[0] if get_origin(member) is Annotated else member


def _names(member: Any) -> set[str]:
    """What pydantic calls a member of a union in a location."""
    if get_origin(member) is Annotated:
        return {meta.tag for meta in get_args(member)[1:] if isinstance(meta, Tag)}
    return {getattr(member, "__name__", ""), str(member)}
