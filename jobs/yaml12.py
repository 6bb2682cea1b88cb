"""YAML 1.2's core schema for PyYAML, which speaks 1.1: `yes`, `12:30` and `2024-01-01` are text.

`Loader` reads it, and refuses a key that a mapping holds twice. `Dumper` writes text so that
readers of either version take it for text. Knows nothing of specs.
https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from typing import Any

import yaml

_CORE = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
]


MOST_DIGITS = 300
"""Of a whole number: Python refuses to write longer ones, at some length."""


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and no key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None, "an opened mapping composes to a node"
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > MOST_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these as they are between single quotes, and reads them as line ends.
        style = '"' if set(text) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, Dumper.represent_text)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
for _tag, _pattern, _first in _CORE:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )


def load(text: str) -> Any:
    """The value that the text says. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=Loader)
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets these through for tags that do not fit, endless digits and deep nesting.
        raise yaml.YAMLError(f"holds a value that cannot be read: {error}") from error


def dump(value: Any) -> str:
    """The value as block-style YAML that `load` reads back, keys in the order given."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))
