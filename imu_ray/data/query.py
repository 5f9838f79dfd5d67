"""A condition on columns, as text: ``label == 3 and site in ("x", "y")``, as an Arrow expression. Nothing is run."""

import ast
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from imu_ray.errors import ForgetSetError, nearest

SETTING = "forget_set.where"
ALLOWED = (
    "expected column names, texts in quotes, numbers, True and False, with == != < <= > >=, in (...), not in (...), "
    "is None, is not None, and, or, not and brackets"
)
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


@dataclass
class Query:
    """A condition for tables with a schema.

    A row without a value in a column meets no comparison with it, and no ``in`` and ``not in``.

    Attributes:
        text: as it was given.
        schema: of the tables; its columns are what names stand for.
        columns: those that are named.

    Raises:
        ForgetSetError: the text is no such condition (the place is told), or does not fit the columns.
    """

    text: str
    schema: pa.Schema
    columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._line = " ".join(self.text.split("\n")).strip()
        try:
            tree = ast.parse(self._line, mode="eval").body
            self.expression = self._condition(tree)
        except SyntaxError as error:
            raise self._refused(error.offset or 1, f"the text breaks off or is not understood ({error.msg})") from None
        except (RecursionError, MemoryError, ValueError) as error:
            raise self._refused(1, f"it is too deep, or holds what no text holds ({type(error).__name__})") from None
        if not self.columns:
            raise self._refused(1, "it names no column")
        self._filter(self.schema.empty_table())

    def rows(self, table: pa.Table) -> pa.Array:
        """Places of the rows that meet it, ascending."""
        place = "place of the row"
        numbered = table.select(self.columns).append_column(place, pa.array(range(len(table)), pa.int64()))
        return self._filter(numbered)[place].combine_chunks()

    def _filter(self, table: pa.Table) -> pa.Table:
        try:
            return table.filter(self.expression)
        except pa.ArrowException as error:
            types = ", ".join(f"{name}: {self.schema.field(name).type}" for name in self.columns)
            raise ForgetSetError(
                f"{SETTING} {self._line!r} does not fit the columns {types} ({str(error).splitlines()[0]}); expected "
                "values of a column's own type; put texts in quotes, and numbers not"
            ) from None

    def _condition(self, node: ast.expr) -> pc.Expression:
        """What is true or false of a row."""
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return functools.reduce(join, map(self._condition, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = map(self._comparison, [node] * len(node.ops), sides, node.ops, sides[1:])
            return functools.reduce(operator.and_, parts)
        if isinstance(node, ast.Name):
            return self._column(node)
        raise self._unknown(node)

    def _comparison(self, node: ast.expr, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(kind, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refused(self._place(right), "after `is` stands something else than None")
            column = self._column(left)
            return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
        if isinstance(kind, ast.In | ast.NotIn):
            column = self._column(left)
            if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
                raise self._refused(self._place(right), "after `in` stands something else than values in brackets")
            among = column.isin(self._values(left, right.elts))
            return among if isinstance(kind, ast.In) else ~among & column.is_valid()
        sides = self._operand(left, right), self._operand(right, left)
        if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
            raise self._refused(self._place(left), "a comparison without a column")
        return COMPARISONS[type(kind)](*sides)

    def _values(self, column: ast.expr, nodes: list[ast.expr]) -> pa.Array:
        """The values that a column's may be among."""
        values = [self._value(node, column) for node in nodes]
        try:
            return pa.array([value.as_py() for value in values], self._time(column))
        except pa.ArrowException:
            raise self._refused(self._place(nodes[0]), "the values in brackets are of several types") from None

    def _operand(self, node: ast.expr, beside: ast.expr) -> pc.Expression:
        return self._column(node) if isinstance(node, ast.Name) else pc.scalar(self._value(node, beside))

    def _column(self, node: ast.expr) -> pc.Expression:
        if not isinstance(node, ast.Name):
            raise self._unknown(node)
        if (count := self.schema.names.count(node.id)) != 1:
            why = f"the data has {count or 'no'} column{'s' * (count > 1)} {node.id!r}"
            raise self._refused(self._place(node), why, nearest(node.id, self.schema.names))
        if node.id not in self.columns:
            self.columns.append(node.id)
        return pc.field(node.id)

    def _value(self, node: ast.expr, beside: ast.expr) -> pa.Scalar:
        """A constant; a text beside a column of times is one."""
        minus = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner: Any = node.operand if isinstance(node, ast.UnaryOp) and minus else node
        if not isinstance(inner, ast.Constant) or (minus and type(inner.value) not in (int, float)):
            raise self._unknown(node)
        value: Any = inner.value
        if type(value) not in (bool, int, float, str):
            raise self._refused(self._place(node), f"{value!r} (a missing value is told by `is None`)")
        try:
            scalar = pa.scalar(-value if minus else value)
            kind = self._time(beside)
            return scalar if kind is None else scalar.cast(kind)
        except (pa.ArrowException, OverflowError) as error:
            raise self._refused(self._place(node), f"a value that is not understood ({error})") from None

    def _time(self, node: ast.expr) -> pa.DataType | None:
        """The type of a column of times; None of anything else."""
        kind = self.schema.field(node.id).type if isinstance(node, ast.Name) and node.id in self.schema.names else None
        return kind if kind is not None and pa.types.is_temporal(kind) else None

    def _unknown(self, node: ast.expr) -> ForgetSetError:
        shown = ast.get_source_segment(self._line, node)
        return self._refused(self._place(node), f"{shown!r} is nothing that may stand here")

    def _place(self, node: ast.expr) -> int:
        return len(self._line.encode()[: node.col_offset].decode()) + 1

    def _refused(self, place: int, why: str, remedy: str = ALLOWED) -> ForgetSetError:
        return ForgetSetError(f"{SETTING} {self._line!r}, at character {place}: {why}; {remedy}")
