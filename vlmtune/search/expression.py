"""Arithmetic over option names, such as "2 * lora_r".

An expression is parsed to Python's syntax tree and evaluated by walking it. It is never executed as code.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlmtune.errors import ConfigError

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": round,  # to a whole number only: a number of digits can be so large that it takes hours
    "int": int,
    "float": float,
    "abs": abs,
    "sqrt": math.sqrt,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
# Limits: a larger value is a typing error, and raising large whole numbers to a power takes minutes.
_MAX_LENGTH = 500  # characters
_MAX_POWER = 64
_MAX_WHOLE = 2**64

_ALLOWED = (
    f"numbers, options, + - * / // % **, comparisons, `a if condition else b`, and {', '.join(_FUNCTIONS)}"
)


@dataclass(frozen=True)
class Expression:
    """A checked expression. Make one with `Expression.parse`."""

    text: str

    @classmethod
    def parse(cls, text: Any, label: str) -> "Expression":
        """Parse an expression.

        Args:
            label: the beginning of error messages.

        Raises:
            ConfigError: it is not a text, does not parse, or holds anything but arithmetic.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f'{label}: an expr is a text, such as "2 * lora_r", not {text!r}')
        if len(text) > _MAX_LENGTH:
            raise ConfigError(
                f"{label}: an expr of {len(text)} characters is too long; {_MAX_LENGTH} are allowed"
            )
        expression = cls(text.strip())
        try:
            _check(expression._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise ConfigError(
                f'{label}: expr "{text}" does not parse: {reason}; it may hold {_ALLOWED}'
            ) from None
        return expression

    @cached_property
    def _tree(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    @property
    def variables(self) -> list[str]:
        """The option names in the expression, each once, in order of appearance."""
        called = {id(node.func) for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        names = [
            node for node in ast.walk(self._tree) if isinstance(node, ast.Name) and id(node) not in called
        ]
        return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: node.col_offset)))

    def evaluate(self, values: Mapping[str, Any], label: str) -> Any:
        """Evaluate the expression.

        Args:
            values: a value for each of `variables`.
            label: the beginning of error messages.

        Raises:
            ConfigError: it has no value, as in a division by zero; the message names the values.
        """
        try:
            result = _evaluate(self._tree, values)
            if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
                raise ValueError(f"it is {result}")
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ConfigError(
                f'{label}: expr "{self.text}" has no value where {self.where(values)}: {error}'
            ) from None
        return result

    def where(self, values: Mapping[str, Any]) -> str:
        """The values of the variables, for a message."""
        return ", ".join(f"{name} is {values[name]}" for name in self.variables) or "nothing varies"


def _check(node: ast.AST) -> None:
    """Raises ValueError for anything but arithmetic."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str()) | ast.Name():
            return
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            children: list[ast.expr] = [node.left, node.right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            children = [operand]
        case ast.Compare(left=left, ops=ops, comparators=comparators) if all(
            type(op) in _COMPARISONS for op in ops
        ):
            children = [left, *comparators]
        case ast.IfExp(test=test, body=body, orelse=orelse):
            children = [test, body, orelse]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            if name not in ("min", "max") and len(args) != 1:
                raise ValueError(f"{name} takes one value, not {len(args)}")
            children = args
        case _:
            raise ValueError(
                f"{ast.unparse(node)} is not allowed"
                if isinstance(node, ast.expr)
                else "it is not an expression"
            )
    for child in children:
        _check(child)


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _number(_evaluate(left, values)), _number(_evaluate(right, values)))
        case ast.UnaryOp(op=op, operand=operand):
            number = _number(_evaluate(operand, values))
            return -number if isinstance(op, ast.USub) else number
        case ast.Compare(left=first, ops=ops, comparators=comparators):
            sides = [_evaluate(side, values) for side in (first, *comparators)]
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, values) else orelse, values)
        case ast.Call(func=ast.Name(id=name), args=args):
            return _bounded(_FUNCTIONS[name](*(_number(_evaluate(arg, values)) for arg in args)))
    raise TypeError(f"{ast.unparse(node)} is not allowed")


def _arithmetic(op: ast.operator, left: float, right: float) -> Any:
    if isinstance(op, ast.Pow) and abs(right) > _MAX_POWER:
        raise ValueError(f"{right} is too large a power")
    return _bounded(_ARITHMETIC[type(op)](left, right))


def _bounded(result: Any) -> Any:
    if isinstance(result, int) and abs(result) > _MAX_WHOLE:
        raise ValueError("the result is too large")
    return result


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
