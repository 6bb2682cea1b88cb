"""`source.where`: a condition over a row's columns, in Python's notation, evaluated by Arrow.

    width >= 512 and license in ["cc0", "cc-by"] and not contains(lower(caption), "chart")
    meta.score > 0.5 or meta.score is None

Columns are names, with dots for what is nested; there are `==` and its kin, `in`, `is None`, `and`,
`or`, `not`, arithmetic, and the functions of FUNCTIONS. A condition that is null (as a comparison
with a missing value is) does not hold. Nothing of a condition is ever run as Python.
"""

import ast
import functools
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
    "matches": lambda text, pattern: pc.match_substring_regex(text, pattern),
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
    ast.Div: lambda a, b: a / b,
}
CONSTANTS = (str, int, float, bool)


Path = tuple[str, ...]
"""A column's name, and those of what is nested in it."""


@dataclass(frozen=True)
class Where:
    """A condition, and the values that it looks at."""

    text: str
    paths: frozenset[Path]
    expression: Expression

    @property
    def columns(self) -> set[str]:
        return {path[0] for path in self.paths}

    def holds(self, rows: Sequence[Mapping[str, object]]) -> list[bool | FilterFailed]:
        """For each row, whether the condition holds, or why that cannot be told."""
        if not rows:
            return []
        try:
            return list(self._evaluated(rows))
        except (pa.ArrowException, TypeError, OverflowError):
            # Rows of other types than their neighbours are told apart one by one.
            return [self._holds_alone(row) for row in rows]

    def _holds_alone(self, row: Mapping[str, object]) -> bool | FilterFailed:
        try:
            return self._evaluated([row])[0]
        except (pa.ArrowException, TypeError, OverflowError) as error:
            values = {".".join(path): _at(path, row) for path in sorted(self.paths)}
            reason = " ".join(str(error).split())
            return FilterFailed(
                f"source.where {self.text!r} cannot be evaluated for {values!r:.200}: "
                f"{reason:.200}; write the condition so that it fits the columns' types"
            )

    def _evaluated(self, rows: Sequence[Mapping[str, object]]) -> list[bool]:
        # Without a column of its own, a table of a condition without columns has no rows.
        data = {".".join(path): pa.array([_at(path, row) for row in rows]) for path in self.paths}
        table = pa.table({**data, "": pa.nulls(len(rows))})
        found = ds.dataset(table).to_table(columns={"holds": self.expression})["holds"]
        return [value is True for value in found.cast(pa.bool_()).to_pylist()]


def _at(path: Path, row: Mapping[str, object]) -> object:
    """The value at the path; null where anything on the way is missing."""
    value: object = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def columns_of(where: Where | None) -> set[str]:
    """The columns that a condition looks at."""
    return where.columns if where else set()


def where_of(text: str | None) -> Where | None:
    """The condition of a spec, if it has one. Raises SpecError as `parse_where` does."""
    return parse_where(text) if text else None


@functools.cache
def parse_where(text: str) -> Where:
    """The condition of a spec. Raises SpecError for what is no such condition."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        reader = _Reader()
        expression = reader.condition(tree)
        return Where(text, frozenset(reader.paths), expression)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(_told(text, f"is no condition: {error}")) from error
    except _NotAllowed as error:
        raise SpecError(_told(text, str(error))) from error
    except (pa.ArrowException, TypeError) as error:
        raise SpecError(_told(text, f"cannot be understood: {error}")) from error


def _told(text: str, reason: str) -> str:
    return (
        f"source.where: {text!r} {reason}; wants a condition over columns, such as "
        'width >= 512 and license in ["cc0", "cc-by"]'
    )


class _NotAllowed(Exception):
    """What a condition holds that is none of the parts it may have."""


class _Reader:
    """A tree of Python's syntax to one of Arrow's, and the columns on the way."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()

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
        return self._value(node)

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

    def _value(self, node: ast.expr) -> Expression:
        if isinstance(node, ast.Constant) and isinstance(node.value, CONSTANTS):
            return pc.scalar(node.value)
        if isinstance(node, ast.Name | ast.Attribute):
            return self._column(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return pc.negate(self._value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](self._value(node.left), self._value(node.right))
        if isinstance(node, ast.Call):
            return self._call(node)
        raise _NotAllowed(f"holds {ast.unparse(node)!r:.80}, which a condition may not")

    def _column(self, node: ast.expr) -> Expression:
        path: Path = ()
        while isinstance(node, ast.Attribute):
            path = (node.attr, *path)
            node = node.value
        if not isinstance(node, ast.Name):
            raise _NotAllowed(f"holds {ast.unparse(node)!r:.80}, which is no column")
        path = (node.id, *path)
        self.paths.add(path)
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
        return FUNCTIONS[name](self._value(first), *plain)


def _constants(node: ast.expr) -> list[object]:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        raise _NotAllowed("has `in` with something else than a list")
    values: list[object] = [part.value for part in node.elts if isinstance(part, ast.Constant)]
    if len(values) < len(node.elts):
        raise _NotAllowed("has a list that holds something else than texts and numbers")
    return values
