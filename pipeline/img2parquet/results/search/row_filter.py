"""Parse a filter over an output's columns, as `width > 512 and label in ("cat", "dog")`, into an Arrow expression.

Filters have Python's syntax, of which only comparisons, `in`, `is None`, `and`, `or`, `not`, column names, and plain
values are allowed; `column("a-b")` names a column whose name is no Python name. A row whose value is missing passes
no comparison.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from img2parquet.errors import InputError, nearest

FORM = 'write `width > 512`, `label == "cat"`, `label in ("cat", "dog")` or `label is None`, joined by and, or, not'
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


@dataclass
class RowFilter:
    """A parsed filter. `columns` are those that it reads."""

    text: str
    expression: pc.Expression
    columns: list[str] = field(default_factory=list)

    def passes(self, table: pa.Table) -> list[int]:
        """Return the indices of the table's rows that pass."""
        numbered = table.select(self.columns).append_column("row", pa.array(range(table.num_rows), pa.int64()))
        names = [*(f"column {i}" for i in range(len(self.columns))), "row"]  # a column may be called `row`
        found: list[int] = numbered.rename_columns(names).filter(self.expression).column("row").to_pylist()
        return found


def parse_filter(text: str, schema: pa.Schema) -> RowFilter:
    """Parse a filter for rows of a schema. Raises InputError for a mistake in it, or a column that is not there."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"--where `{text}`: {str(error).partition(' (')[0]}", hint=FORM) from None
    known = [one.name for one in schema if not pa.types.is_nested(one.type)]
    made = RowFilter(text, pc.scalar(True))
    made.expression = _Parser(made, known).condition(tree.body)
    types = [pa.field(f"column {i}", schema.field(name).type) for i, name in enumerate(made.columns)]
    try:
        pa.schema(types).empty_table().filter(made.expression)
    except (pa.ArrowException, TypeError, ValueError) as error:
        kinds = ", ".join(f"`{name}` is {schema.field(name).type}" for name in made.columns)
        message = f"--where `{text}`: {str(error).splitlines()[0]}"
        raise InputError(message, hint=f"compare with values of the column's type: {kinds}") from None
    return made


class _Parser:
    def __init__(self, made: RowFilter, known: list[str]) -> None:
        self.made, self.known = made, known

    def condition(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            found, *others = (self.condition(value) for value in node.values)
            for other in others:
                found = found & other if isinstance(node.op, ast.And) else found | other
            return found
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [self._comparison(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:], strict=False)]
            found = pairs[0]
            for pair in pairs[1:]:
                found = found & pair
            return found
        if isinstance(node, ast.Name | ast.Call):
            return self._column(node)  # of booleans
        raise self._wrong(node)

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise self._wrong(right)
            found = self._side(left).isin([self._constant(value) for value in right.elts])
            return found if isinstance(op, ast.In) else ~found
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._wrong(right)
            found = self._side(left).is_null()
            return found if isinstance(op, ast.Is) else ~found
        return COMPARISONS[type(op)](self._side(left), self._side(right))

    def _side(self, node: ast.expr) -> pc.Expression:
        return self._column(node) if isinstance(node, ast.Name | ast.Call) else pc.scalar(self._constant(node))

    def _column(self, node: ast.Name | ast.Call) -> pc.Expression:
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node.func, ast.Name) and node.func.id == "column" and len(node.args) == 1:
            name = self._constant(node.args[0])
        else:
            raise self._wrong(node)
        if name not in self.known:
            message = f"--where `{self.made.text}`: no column `{name}` of plain values"
            raise InputError(message, known=self.known, hint=nearest(str(name), self.known))
        if name not in self.made.columns:
            self.made.columns.append(name)
        return pc.field(f"column {self.made.columns.index(name)}")

    def _constant(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._constant(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
            return node.value
        raise self._wrong(node)

    def _wrong(self, node: ast.expr) -> InputError:
        return InputError(f"--where `{self.made.text}`: `{ast.unparse(node)}` cannot be used here", hint=FORM)
