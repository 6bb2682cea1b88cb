"""Prompts as templates over a row."""

import pytest

from pipeline.template import template_of
from schemas.errors import SpecError, TemplateFailed

ROW = {"artist": "Bo", "the title": "Sea", "size": {"w": 3}, "tags": ["a", "b"], "hint": None}
ANSWERS = {"animal": "dog", "is-new": "no"}


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("What is this?", "What is this?"),
        ("What did {{ artist }} paint?", "What did Bo paint?"),
        ("Is {{ row['the title'] }} by {{ row.artist }}?", "Is Sea by Bo?"),
        ("Is the {{ answers.animal }} new: {{ answers['is-new'] }}?", "Is the dog new: no?"),
        ("{{ size.w }} and {{ tags | join('+') }}", "3 and a+b"),
        ("{{ hint | default('Describe it.') }}", "Describe it."),
        ("{{ gone | d('Describe it.') }}", "Describe it."),
        ("{% if gone is defined %}{{ gone }}{% else %}none{% endif %}", "none"),
        ("{% for tag in tags %}{{ tag }};{% endfor %}", "a;b;"),
        ("Braces: {{ '{{' }}", "Braces: {{"),
    ],
)
def test_a_template_is_filled_in(text: str, rendered: str) -> None:
    assert template_of(text).render(ROW, ANSWERS) == rendered


def test_a_template_says_what_it_looks_at() -> None:
    text = (
        "{{ artist }} {{ row['the title'] }} {{ hint | default('') }} {{ answers.animal }}"
        "{% set x = other %}{{ x }}{% if a is defined %}{{ a }}{% endif %}{{ range(3) | join }}"
    )
    template = template_of(text)
    assert template.required == {"artist", "the title", "other"}
    assert template.columns == template.required | {"hint", "a"}
    assert template.answers == {"animal"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ hint }}", "'hint' is undefined"),
        ("{{ gone }}", "'gone' is undefined"),
        ("{% if gone %}x{% endif %}", "'gone' is undefined"),
        ("{{ artist.__class__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ hint | default('') }} ", "is empty for this row"),
    ],
)
def test_what_cannot_be_filled_in_fails_the_row(text: str, reason: str) -> None:
    with pytest.raises(TemplateFailed, match=reason):
        template_of(text).render(ROW, ANSWERS)


def test_values_are_never_taken_for_templates() -> None:
    row = {"artist": "{{ answers.animal }}{% for x in range(9) %}"}
    assert template_of("By {{ artist }}?").render(row, ANSWERS) == f"By {row['artist']}?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ artist", "no template"),
        ("{% for %}", "no template"),
        ("{{ artist | shout }}", "No filter named 'shout'"),
        ("{{ row[artist] }}", "row is used without a name"),
        ("{{ answers | length }}", "answers is used without a name"),
    ],
)
def test_what_is_no_template_is_a_mistake_in_the_spec(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        template_of(text)
