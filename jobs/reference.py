"""The reference page of the job spec, `docs/spec.md`, from the descriptions in `schemas/job.py`."""

import json
import re
from collections.abc import Iterator
from typing import Any

from schemas.job import JobSpec

HEAD = """\
# The job spec

A job is a YAML file. `lavaflow spec` prints this page, `lavaflow spec --schema` a JSON Schema for
editors. Only `source`, `ask` and `output` must be there.

```yaml
name: street-scenes
source:
  format: webdataset
  path: shards/{00000..00099}.tar
  keep: [url, license]
ask:
  - {id: caption, prompt: "Describe the image in one sentence."}
  - {id: indoor, prompt: "Is this scene indoors?", max_new_tokens: 4}
  - {from: questions}
model: {path: llava-hf/llava-1.5-7b-hf}
output: {path: answers/street-scenes}
```

- YAML is read with the scalars of YAML 1.2: `true` and `false` are booleans, `yes`, `no`, `on` and
  `off` are text. A key given twice is an error, and so is a key that is not on this page.
- `--set KEY=VALUE` overrides the file: `--set generate.max_new_tokens=32`, or
  `--set ask.0.prompt="What is this?"`. The value is YAML. Defaults give way to the file, and the
  file to `--set`.
- Relative local paths, and `~`, are taken from the folder that the command runs in. Every path can
  be any URL that fsspec knows, such as `s3://bucket/shards/{00000..00099}.tar`.
- Secrets never stand in a spec: they come from the environment, as `AWS_ACCESS_KEY_ID` and
  `AWS_SECRET_ACCESS_KEY` do.
"""


def reference_page() -> str:
    """Markdown: a table of keys for each part of the spec."""
    schema = JobSpec.model_json_schema(by_alias=True)
    return HEAD + "".join(_sections(schema, schema["$defs"], key=""))


def _sections(model: dict[str, Any], models: dict[str, Any], *, key: str) -> Iterator[str]:
    title = f"## `{key}`" if key else "## The whole"
    yield f"\n{title}\n\n{_text(model['description'])}\n\n"
    yield "| key | type | default | |\n|---|---|---|---|\n"
    for name, field in model["properties"].items():
        default = _default(field, is_required=name in model.get("required", []))
        says = _text(field.get("description", ""))
        yield f"| `{name}` | {_type(field, models)} | {default} | {says} |\n"
    for name, field in model["properties"].items():
        for index, inner in enumerate(_models(field)):
            where = f"{key}.{name}" if key else name
            if "items" in field:
                where += f".N` {'or' if index else 'as'} `{_shape(models[inner])}"
            yield from _sections(models[inner], models, key=where)


def _shape(model: dict[str, Any]) -> str:
    """How an entry of a list looks, as `{id, prompt}`."""
    keys = [(name, model["properties"][name].get("const")) for name in model["required"]]
    return "{" + ", ".join(f"{name}: {value}" if value else name for name, value in keys) + "}"


def _models(field: dict[str, Any]) -> list[str]:
    """Names of the models that a field holds, as itself or as the entries of a list."""
    choices = [field, *field.get("oneOf", []), *field.get("anyOf", [])]
    items = field.get("items", {})
    choices += [items, *items.get("oneOf", []), *items.get("anyOf", [])]
    return [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]


def _type(field: dict[str, Any], models: dict[str, Any]) -> str:
    if _models(field):
        return "list of mappings" if "items" in field else "mapping"
    options = field.get("anyOf", [field])
    return " or ".join(_one_type(o) for o in options if o.get("type") != "null")


def _one_type(option: dict[str, Any]) -> str:
    if "const" in option:
        return f"`{option['const']}`"
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if option["type"] == "array":
        if "prefixItems" in option:
            return f"[{', '.join(_one_type(item) for item in option['prefixItems'])}]"
        return f"list of {_one_type(option['items'])}s"
    names = {"integer": "whole number", "boolean": "true or false", "object": "mapping"}
    kind = str(option["type"])
    return names.get(kind, kind) + _bounds(option)


def _bounds(option: dict[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {option[key]:g}" for key, word in words.items() if key in option]
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(field: dict[str, Any], *, is_required: bool) -> str:
    if is_required:
        return "required"
    if _models(field):
        return ""
    return f"`{json.dumps(field['default'])}`"


def _text(description: str) -> str:
    return re.sub(r"\s+", " ", description).strip().replace("|", r"\|")
