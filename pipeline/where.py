"""Conditions over a row's columns, in Python's notation, evaluated by Arrow.

They are `source.where`, and `when` of an entry of `ask`, where names may be earlier answers, too.

    width >= 512 and license in ["cc0", "cc-by"] and not contains(lower(caption), "chart")
    meta.score > 0.5 or meta.score is None

Columns are names, with dots for what is nested; there are `==` and its kin, `in`, `is None`, `and`,
`or`, `not`, arithmetic, and the functions of FUNCTIONS. A condition that is null (as a comparison
with a missing value is) does not hold. Nothing of a condition is ever run as Python.
"""

import ast
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from schemas.errors import FilterFailed, SpecError

Expression: TypeAlias = Any
"""A pyarrow.compute.Expression, of which pyarrow gives no types."""

FUNCTIONS: Mapping[str, Callable[..., Expression]] = {
    "len": lambda text: pc.utf8_length(text),
    "lower": lambda text: pc.utf8_lower(text),
    "contains": lambda text, part: pc.match_substring(text, part),
    "matches": lambda text, pattern: pc.match_substring_regex(text, _regex(pattern)),
}
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Expression, Expression], Expression]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
ARITHMETIC: Mapping[type[ast.operator], Callable[[Expression, Expression], Expression]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    # Arrow's own is a whole number where both are.
    ast.Div: lambda a, b: a * 1.0 / b,
}
CONSTANTS = (str, int, float, bool)
UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError)
"""What Arrow, or the way to it, raises for values that it cannot take or compare."""
Path = tuple[str, ...]
"""A column's name, and those of what is nested in it."""
Values = tuple[object, ...]
"""What a row has at each path of a condition."""


@dataclass(frozen=True)
class Where:
    """A condition, and the values that it looks at. `nulls`: types that a missing value needs.
    `key`: of the spec."""

    key: str
    text: str
    paths: tuple[Path, ...]
    nulls: Mapping[Path, pa.DataType]
    expression: Expression

    @property
    def columns(self) -> set[str]:
        return {path[0] for path in self.paths}

    def holds(self, rows: Sequence[Mapping[str, object]]) -> list[bool | FilterFailed]:
        """For each row, whether the condition holds, or why that cannot be told.

        No row decides another's: only rows whose values have the same types share Arrow's arrays.
        """
        values = [tuple(_at(path, row) for path in self.paths) for row in rows]
        alike: dict[tuple[type, ...], list[int]] = {}
        for number, row in enumerate(values):
            alike.setdefault(tuple(map(type, row)), []).append(number)
        held: dict[int, bool | FilterFailed] = {}
        for numbers in alike.values():
            held |= zip(numbers, self._held([values[n] for n in numbers]), strict=True)
        return [held[number] for number in range(len(rows))]

    def _held(self, rows: Sequence[Values]) -> Sequence[bool | FilterFailed]:
        try:
            return self._evaluated(rows)
        except UNFIT as error:
            if len(rows) > 1:
                return [held for row in rows for held in self._held([row])]
            return [self._failure(rows[0], error)]

    def _failure(self, row: Values, error: Exception) -> FilterFailed:
        values = zip(self.paths, row, strict=True)
        told = ", ".join(f"{'.'.join(path)!r}: {_short(value)}" for path, value in values)
        reason = " ".join(str(error).split())
        return FilterFailed(
            f"{self.key} {self.text!r:.200} cannot be evaluated for {{{told:.200}}}: "
            f"{reason:.200}; write the condition so that it fits the columns' types"
        )

    def _evaluated(self, rows: Sequence[Values]) -> Sequence[bool]:
        try:
            return self._evaluated_as(rows, null=pa.null())
        except UNFIT:
            # Arrow compares what is missing with anything but what is missing.
            return self._evaluated_as(rows, null=pa.string())

    def _evaluated_as(self, rows: Sequence[Values], *, null: pa.DataType) -> Sequence[bool]:
        # Without a column of its own, a table of a condition without columns has no rows.
        data = {"": pa.nulls(len(rows))}
        for path, column in zip(self.paths, zip(*rows, strict=True), strict=False):
            kind = self.nulls.get(path, null) if column[0] is None else None
            data[".".join(path)] = pa.array(column, kind)
        found = ds.dataset(pa.table(data)).to_table(columns={"holds": self.expression})["holds"]
        return [value is True for value in found.cast(pa.bool_()).to_pylist()]


def _short(value: object) -> str:
    if isinstance(value, Mapping | list):
        return "a list" if isinstance(value, list) else "an object"
    try:
        return f"{value!r:.60}"
    except ValueError:
        return "a number without end"


def _at(path: Path, row: Mapping[str, object]) -> object:
    """The value at the path; null where anything on the way is missing.

    What is nested stands empty: all that can be asked of it is whether it is there.
    """
    value: object = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping | list):
        return [] if isinstance(value, list) else {}
    return value


def columns_of(where: Where | None) -> set[str]:
    """The columns that a condition looks at."""
    return where.columns if where else set()


def where_of(text: str | None) -> Where | None:
    """The condition of a spec, if it has one. Raises SpecError as `parse_where` does."""
    return parse_where(text) if text else None


@functools.cache
def parse_where(text: str, *, key: str = "source.where") -> Where:
    """The condition of a spec. Raises SpecError for what is no such condition."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes that are no escapes
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(_told(key, text, f"is no condition: {error}")) from error
    try:
        reader = _Reader()
        expression = reader.condition(tree)
        return Where(key, text, tuple(sorted(reader.paths)), reader.nulls, expression)
    except _NotAllowed as error:
        raise SpecError(_told(key, text, str(error))) from error
    except UNFIT as error:
        raise SpecError(_told(key, text, f"cannot be understood: {error}")) from error


def _told(key: str, text: str, reason: str) -> str:
    return (
        f"{key}: {text!r:.200} {reason:.200}; wants a condition over columns, such as "
        'width >= 512 and license in ["cc0", "cc-by"]'
    )


class _NotAllowed(Exception):
    """What a condition holds that is none of the parts it may have."""


class _Reader:
    """A tree of Python's syntax to one of Arrow's, and the columns on the way."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self.nulls: dict[Path, pa.DataType] = {}

    def condition(self, node: ast.expr) -> Expression:
        """What is true or false. Kleene's logic: `x or null` is true where x is."""
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            joined = (lambda a, b: a & b) if isinstance(node.op, ast.And) else (lambda a, b: a | b)
            return functools.reduce(joined, parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        return self._value(node, pa.bool_())

    def _comparison(self, node: ast.Compare) -> Expression:
        left, parts = node.left, []
        for operator, right in zip(node.ops, node.comparators, strict=True):
            parts.append(self._compared(left, operator, right))
            left = right
        return functools.reduce(lambda a, b: a & b, parts)

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Expression:
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _NotAllowed("has `is` with something else than None")
            null = self._value(left).is_null()
            return ~null if isinstance(operator, ast.IsNot) else null
        if isinstance(operator, ast.In | ast.NotIn):
            found = self._value(left).isin(_constants(right))
            return ~found if isinstance(operator, ast.NotIn) else found
        return COMPARISONS[type(operator)](self._value(left), self._value(right))

    def _value(self, node: ast.expr, null: pa.DataType | None = None) -> Expression:
        """`null`: the type that a column has to have here, if any, even where it is missing."""
        if isinstance(node, ast.Constant) and isinstance(node.value, CONSTANTS):
            return pc.scalar(node.value)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._column(node, null)
        number = pa.float64()
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return pc.negate(self._value(node.operand, number))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            made = ARITHMETIC[type(node.op)]
            return made(self._value(node.left, number), self._value(node.right, number))
        if isinstance(node, ast.Call):
            return self._call(node)
        raise _NotAllowed(f"holds {ast.unparse(node)!r:.80}, which a condition may not")

    def _column(self, node: ast.expr, null: pa.DataType | None) -> Expression:
        path: Path = ()
        while isinstance(node, ast.Attribute):
            path = (node.attr, *path)
            node = node.value
        if not isinstance(node, ast.Name):
            raise _NotAllowed(f"holds {ast.unparse(node)!r:.80}, which is no column")
        path = (node.id, *path)
        self.paths.add(path)
        if null is not None:
            self.nulls[path] = null
        return pc.field(".".join(path))

    def _call(self, node: ast.Call) -> Expression:
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS:
            raise _NotAllowed(f"calls {name!r:.80}; there are {', '.join(FUNCTIONS)}")
        if node.keywords or not node.args:
            raise _NotAllowed(f"calls {name!r} with the wrong arguments")
        first, *rest = node.args
        plain = [part.value for part in rest if isinstance(part, ast.Constant)]
        if len(plain) < len(rest) or not all(isinstance(value, str) for value in plain):
            raise _NotAllowed(f"calls {name!r} with something else than a column and texts")
        return FUNCTIONS[name](self._value(first, pa.string()), *plain)


def _constants(node: ast.expr) -> list[object]:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        raise _NotAllowed("has `in` with something else than a list")
    values: list[object] = [part.value for part in node.elts if isinstance(part, ast.Constant)]
    if len(values) < len(node.elts) or not all(isinstance(value, CONSTANTS) for value in values):
        raise _NotAllowed("has a list that holds something else than texts and numbers")
    if not values:
        raise _NotAllowed("has `in` with an empty list")
    return values


def _regex(pattern: str) -> str:
    """The pattern; raises ArrowInvalid where it is none."""
    pc.match_substring_regex(pa.scalar(""), pattern)
    return pattern
