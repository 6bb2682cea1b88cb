"""From what a person wrote to a JobSpec: YAML, `--set` overrides, absolute paths; and back.

Precedence: defaults, then the file, then `--set`. Knows nothing of Ray, and opens no store.
"""

import copy
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs import yaml12
from jobs.mistakes import mistakes
from schemas.errors import SpecError
from schemas.job import EMBEDDED, JobSpec


def load_spec(path: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The job of a YAML file, with `KEY=VALUE` overrides.

    Raises SpecError, naming every mistake, for a file that is missing, not YAML or not a spec.
    """
    return build_spec(read_yaml(path), overrides, origin=path)


def build_spec(data: dict[str, Any], overrides: Sequence[str] = (), *, origin: str) -> JobSpec:
    """The job that the mapping and the overrides say; `origin` names it in errors.

    Relative local paths become absolute: the workers run in other folders.
    """
    data = override(data, overrides)
    try:
        _refuse_odd_text(data, key="", origin=origin)
        # JSON is where pydantic's strict mode takes lists for tuples and nothing else for granted.
        job = JobSpec.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise SpecError(_told(mistakes(error), origin=origin)) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{origin}: holds a value that no key takes: {error}") from error
    return _with_absolute_paths(job)


def _refuse_odd_text(value: Any, *, key: str, origin: str) -> None:
    """Raises SpecError for text with half a character in it, which neither UTF-8 nor Arrow can
    hold, and with a NUL, which no file's name can.
    """
    if isinstance(value, str) and not _is_unicode(value):
        raise SpecError(f"{origin}: {key}: {value!a:.60} is not valid Unicode text")
    if isinstance(value, str) and "\0" in value:
        raise SpecError(f"{origin}: {key}: {value!a:.60} has a NUL in it; take it out")
    inside = value.items() if isinstance(value, dict) else ()
    for name, each in enumerate(value) if isinstance(value, list) else inside:
        _refuse_odd_text(each, key=f"{key}.{name}" if key else str(name), origin=origin)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(lines: Sequence[str], *, origin: str) -> str:
    if len(lines) == 1:
        return f"{origin}: {lines[0]}"
    return "\n  ".join([f"{origin}: {len(lines)} mistakes", *lines])


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SpecError."""
    try:
        # os.path leaves the `~` of an unknown user as it is, pathlib raises.
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    try:
        data = yaml12.load(text)
    except yaml.YAMLError as error:
        raise SpecError(_yaml_mistake(path, error)) from error
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {data!r:.60}"
        raise SpecError(f"{path}: {found}; a spec is a mapping with source, ask and output")
    return data


def _yaml_mistake(path: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{path}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return f"{path}: not YAML: {error}"


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b.0.c=VALUE` set; the value is YAML. Raises SpecError."""
    result = copy.deepcopy(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SpecError(f"--set {text!r}: write it as KEY=VALUE, as in generate.batch_size=8")
        try:
            parsed = yaml12.load(value)
        except yaml.YAMLError as error:
            raise SpecError(_yaml_mistake(f"--set {text!r}", error)) from error
        _set(result, key.strip().split("."), parsed, text=text)
    return result


def _set(data: dict[str, Any], keys: Sequence[str], value: Any, *, text: str) -> None:
    inside: Any = data
    for depth, key in enumerate(keys):
        slot = _slot(inside, key, text=text, key=".".join(keys[:depth]))
        if depth == len(keys) - 1:
            inside[slot] = value
            return
        if inside[slot] is None:
            inside[slot] = [] if _is_index(keys[depth + 1]) else {}
        inside = inside[slot]


def _slot(inside: Any, part: str, *, text: str, key: str) -> str | int:
    """The key or index of `inside` that `part` names, made where it is not there yet."""
    if isinstance(inside, dict):
        inside.setdefault(part, None)
        return part
    if not isinstance(inside, list):
        raise SpecError(f"--set {text!r}: {key} is {inside!r:.60}, which has no {part!r} in it")
    if not _is_index(part) or int(part) > len(inside):
        raise SpecError(
            f"--set {text!r}: {key} is a list of {len(inside)}; write {key}.N with N from 0, "
            f"{len(inside)} to add an entry"
        )
    if int(part) == len(inside):
        inside.append(None)
    return int(part)


def _is_index(part: str) -> bool:
    """`str.isdigit` would also take `²`, and more digits than `int` does."""
    return re.fullmatch("[0-9]{1,9}", part) is not None


def _with_absolute_paths(job: JobSpec) -> JobSpec:
    path = job.source.path
    source = absolute(path) if isinstance(path, str) else tuple(absolute(p) for p in path)
    root = job.source.image_root
    paths = {"path": source, "image_root": absolute(root) if root else None}
    return job.model_copy(
        update={
            "source": job.source.model_copy(update=paths),
            "output": job.output.model_copy(update={"path": absolute(job.output.path)}),
            "model": job.model.model_copy(update={"path": _model_path(job.model.path)}),
        }
    )


def absolute(path: str) -> str:
    """A local path made absolute against the current folder, `~` expanded; a URL as it is."""
    if "://" in path or _is_chain(path):
        return path
    return os.path.abspath(os.path.expanduser(path))


def _is_chain(path: str) -> bool:
    """Whether this is a chain of fsspec, such as `simplecache::a.tar`, not a name with `::`."""
    if "::" not in path:
        return False
    # Imported here: few paths ask for it.
    from fsspec import available_protocols

    return not set(available_protocols()).isdisjoint(path.split("::"))


def _model_path(path: str) -> str:
    """A hub id looks like a relative path: only what is a local folder, or says so, is one."""
    is_local = path.startswith(("./", "../", "~")) or os.path.isdir(path)
    return absolute(path) if is_local and path != EMBEDDED else path


def dump_spec(job: JobSpec) -> str:
    """The job as YAML that loads back equal; only what differs from the defaults."""
    return yaml12.dump(job.model_dump(mode="json", by_alias=True, exclude_defaults=True))


def json_schema() -> str:
    """JSON Schema of a spec, for editors."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(by_alias=True),
    }
    return json.dumps(schema, indent=2)
