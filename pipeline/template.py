"""Prompts as Jinja templates over the columns of a row and over earlier answers about it.

    What does {{ artist }} show here?         a column; `row["artist name"]` for any name
    Is the {{ answers.animal }} asleep?       the answer to the entry of `ask` with this id
    {{ hint | default("Describe the image.") }}

What is missing, or null, fails the row, unless it stands before `default` or in `is defined`.
Values are data: what they hold is never taken for a template. Templates run sandboxed.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from schemas.errors import SpecError, TemplateFailed

ANSWERS, ROW = "answers", "row"
MARKS = ("{{", "{%", "{#")

_environment = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclass(frozen=True)
class Template:
    """`columns`: those it looks at; `required`: those it cannot do without. `answers`: ids of the
    entries of `ask` whose answers it looks at."""

    text: str
    columns: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()

    def render(self, row: Mapping[str, object], answers: Mapping[str, str]) -> str:
        """The prompt. Raises TemplateFailed."""
        if not _is_template(self.text):
            return self.text
        known = {name: value for name, value in row.items() if value is not None}
        try:
            rendered = _compiled(self.text).render({**known, ROW: known, ANSWERS: answers})
        except Exception as error:
            # Whatever the template calls may raise what it likes.
            raise TemplateFailed(
                f"the prompt {self.text!r:.80} cannot be filled in: {type(error).__name__}: "
                f"{error!s:.200}; write {{{{ ... | default('') }}}} where a value may be missing"
            ) from error
        if not rendered.strip():
            raise TemplateFailed(f"the prompt {self.text!r:.80} is empty for this row")
        return rendered


@functools.cache
def template_of(text: str) -> Template:
    """Raises SpecError, without the key's name, for what is no template."""
    if not _is_template(text):
        return Template(text)
    try:
        tree = _environment.parse(text)
        _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(
            f"{text!r:.80} is no template: {error.message} (line {error.lineno}); write "
            "{{ '{{' }} for two braces that are meant as such"
        ) from error
    except RecursionError as error:
        raise SpecError(f"{text!r:.80} is nested too deeply for a template") from error
    given = jinja2.meta.find_undeclared_variables(tree)
    may_lack = [*_optional(tree)]
    names: dict[str, set[str]] = {ROW: set(), ANSWERS: set()}
    optional: set[str] = set()
    for node in _uses(tree, given):
        kind, name = _named(node, text)
        names[kind].add(name)
        if kind == ROW and any(node is each for each in may_lack):
            optional.add(name)
    return Template(
        text,
        columns=frozenset(names[ROW]),
        required=frozenset(names[ROW] - optional),
        answers=frozenset(names[ANSWERS]),
    )


def _is_template(text: str) -> bool:
    return any(mark in text for mark in MARKS)


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _environment.from_string(text)


def _uses(node: nodes.Node, given: set[str]) -> Iterator[nodes.Expr]:
    """Each name that the row gives, and each `row.NAME` and `answers.NAME` as a whole."""
    for child in node.iter_child_nodes():
        inner = getattr(child, "node", None)
        is_inside = isinstance(child, nodes.Getattr | nodes.Getitem)
        if is_inside and isinstance(inner, nodes.Name) and inner.name in {ROW, ANSWERS} & given:
            yield child  # type: ignore[misc]
        elif isinstance(child, nodes.Name) and child.ctx == "load" and child.name in given:
            yield child
        else:
            yield from _uses(child, given)


def _named(node: Any, text: str) -> tuple[str, str]:
    """Where a value comes from, and what it is called there."""
    if isinstance(node, nodes.Name) and node.name not in (ROW, ANSWERS):
        return ROW, node.name
    if isinstance(node, nodes.Getattr):
        return node.node.name, node.attr  # type: ignore[attr-defined]
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.node.name, str(node.arg.value)  # type: ignore[attr-defined]
    name = node.name if isinstance(node, nodes.Name) else node.node.name
    raise SpecError(
        f"{text!r:.80}: {name} is used without a name that can be known beforehand: write "
        f"{name}.NAME or {name}['NAME']"
    )


def _optional(tree: nodes.Template) -> Iterator[nodes.Node]:
    """What may be missing: before `default`, or in `is defined`."""
    for each in tree.find_all(nodes.Filter):
        if each.name in ("default", "d") and each.node is not None:
            yield each.node
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined"):
            yield test.node
