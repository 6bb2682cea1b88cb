from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.where import parse_where
from schemas.errors import FilterFailed, SpecError

ROWS: list[dict[str, Any]] = [
    {"width": 640, "license": "cc0", "meta": {"score": 0.9}, "text": "A Chart"},
    {"width": 320, "license": None, "meta": {"score": None}, "text": ""},
    {"width": None, "license": "cc-by", "meta": None, "text": None},
]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("width >= 512", [True, False, False]),
        ("not width >= 512", [False, True, False]),
        ("100 < width < 400", [False, True, False]),
        ('license in ["cc0", "cc-by"] and width > 0', [True, False, False]),
        ('license not in ["cc0"]', [False, True, True]),
        ("width is None or width > 600", [True, False, True]),
        ("license is not None", [True, False, True]),
        ("meta.score > 0.5", [True, False, False]),
        ("meta.score is None", [False, True, True]),
        ('contains(lower(text), "chart")', [True, False, False]),
        ('matches(text, "^A .*t$")', [True, False, False]),
        ("len(text) == 0", [False, True, False]),
        ("width / 2 - 20 == 300", [True, False, False]),
        ("width > -1", [True, True, False]),
        ("True", [True, True, True]),
        ("missing == 1", [False, False, False]),
        ("missing is None", [True, True, True]),
        ("missing < gone", [False, False, False]),
        ("not missing + gone > 1", [False, False, False]),
        ("not missing", [False, False, False]),
        ("len(missing) > 0 or -gone < 0", [False, False, False]),
        ("width / 1000 > 0.5", [True, False, False]),
    ],
)
def test_a_condition_holds_where_python_would_say_so(text: str, held: list[bool]) -> None:
    assert parse_where(text).holds(ROWS) == held


def test_columns_are_known_without_rows() -> None:
    assert parse_where('meta.score > 1 and lower(a) == "x"').columns == {"meta", "a"}
    assert parse_where("a > 1").holds([]) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no condition"),
        ("width >", "is no condition"),
        ("__import__('os')", r"calls '__import__'; there are len, lower"),
        ("open('x').read()", r"calls "),
        ("a[0] == 1", r"holds 'a\[0\]'"),
        ("(lambda: 1)()", "calls"),
        ("a in b", "`in` with something else than a list"),
        ("a in [b]", "a list that holds something else"),
        ("a is b", "`is` with something else than None"),
        ("contains(a, b)", "something else than a column and texts"),
        ("lower(a, 'x')", "cannot be understood"),
        ("'x'.y == 1", "is no column"),
        ("a if b else c", "which a condition may not"),
        ("matches(a, '(')", "Invalid regular expression"),
        ("a in []", "an empty list"),
        ("a in [None]", "a list that holds something else"),
        ("a > 100000000000000000000", "cannot be understood: Python int too large"),
        ("0x" + "f" * 5000 + " > a", "cannot be understood"),
    ],
)
def test_what_is_no_condition_is_a_spec_error(text: str, told: str) -> None:
    with pytest.raises(SpecError, match=rf"source\.where: .*{told}"):
        parse_where(text)


def test_a_row_of_another_type_fails_alone() -> None:
    held = parse_where("width > 1").holds([{"width": 2}, {"width": "two"}, {"width": 0}])
    assert [type(value) for value in held] == [bool, FilterFailed, bool]
    assert "'width': 'two'" in str(held[1])


def test_of_what_is_nested_can_be_asked_whether_it_is_there() -> None:
    rows: list[dict[str, Any]] = [{"a": {"b": [1]}}, {"a": [[]]}, {"a": None}, {"a": {}}]
    assert parse_where("a is None").holds(rows) == [False, False, True, False]
    told = parse_where("a == 1").holds(rows)
    assert [type(held) for held in told] == [FilterFailed, FilterFailed, bool, FilterFailed]
    assert "{'a': an object}" in str(told[0])


def test_a_backslash_in_a_pattern_is_no_mistake() -> None:
    assert parse_where(r'matches(a, "^\d+$")').holds([{"a": "12"}, {"a": "x"}]) == [True, False]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)


@given(
    st.text()
    | st.sampled_from(
        ["a > 1", "len(a) > 1", "a.b == 'x'", "a in [1]", "a / 2 < 2.5", "not a", "a < b"]
    ),
    st.lists(st.fixed_dictionaries({"a": VALUES}), max_size=4),
)
def test_any_text_is_a_condition_or_a_spec_error_and_a_row_has_its_outcome(
    text: str, rows: list[dict[str, Any]]
) -> None:
    try:
        where = parse_where(text)
    except SpecError:
        return
    held = where.holds(rows)
    assert all(type(value) in (bool, FilterFailed) for value in held)
    alone = [value for row in rows for value in where.holds([row])]
    assert [str(value) for value in held] == [str(value) for value in alone]
