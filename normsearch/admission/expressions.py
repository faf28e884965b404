"""Expressions of sizes in exported programs: torch gives them to sympy, which evaluates whatever is there."""

from __future__ import annotations

import ast
import re
from typing import Final

_LONGEST, _MOST_PARTS, _DEEPEST = 4000, 400, 40
_MOST_POWER, _LARGEST = 8, 2**63
_SYMBOL = re.compile(r"[a-z_]{1,20}[0-9]{1,9}", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}", re.ASCII)
_ASSUMPTIONS: Final = {"positive", "integer", "nonnegative", "real", "finite", "nonzero", "extended_real"}
#: What sympy's srepr writes for the arithmetic of sizes.
_FUNCTIONS: Final = {
    *("Add", "Mul", "Pow", "Max", "Min", "Mod", "And", "Or", "Not", "Abs", "floor", "ceiling"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("FloorDiv", "PythonMod", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt"),
    *("IntTrueDiv", "FloatTrueDiv", "ToFloat"),
}


def is_size(text: object) -> bool:
    """Tell whether a text is an expression of sizes as torch.export writes it, and nothing else.

    ``Add(Integer(1), Symbol('s77', positive=True, integer=True))``: calls of functions from a list, on
    numbers and symbols.
    """
    tree = _parsed(text)
    return tree is not None and _is_expression(tree.body)


def is_guard(text: object) -> bool:
    """Tell whether a text is a comparison of inputs' sizes, such as ``L['x'].size()[0] >= 2``."""
    tree = _parsed(text)
    return tree is not None and _is_condition(tree.body)


def _parsed(text: object) -> ast.Expression | None:
    if not isinstance(text, str) or len(text) > _LONGEST or not text.isascii() or not text.isprintable():
        return None
    # Before the parser, whose stack is not unlimited.
    if max(text.count("("), text.count("[")) > _MOST_PARTS or "((" * _DEEPEST in text:
        return None
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return (
        tree if _depth(tree) <= 3 * _DEEPEST and sum(1 for _ in ast.walk(tree)) < 10 * _MOST_PARTS else None
    )


def _depth(tree: ast.AST) -> int:
    deepest, level = 0, [tree]
    while level:
        deepest += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return deepest


def _is_expression(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("true", "false")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    name, args = node.func.id, node.args
    if name == "Symbol":
        return (
            len(args) == 1
            and isinstance(args[0], ast.Constant)
            and isinstance(args[0].value, str)
            and _SYMBOL.fullmatch(args[0].value) is not None
            and all(k.arg in _ASSUMPTIONS and _is_bool(k.value) for k in node.keywords)
        )
    if name == "Float":
        precision = all(k.arg == "precision" and _is_integer(k.value, 1000) for k in node.keywords)
        return len(args) == 1 and precision and _is_decimal(args[0])
    if node.keywords:
        return False
    if name in ("Integer", "Rational"):
        return len(args) == (1 if name == "Integer" else 2) and all(_is_integer(a, _LARGEST) for a in args)
    if name == "Pow" and not (len(args) == 2 and _is_small_power(args[1])):
        return False
    return name in _FUNCTIONS and 1 <= len(args) <= 100 and all(map(_is_expression, args))


def _is_small_power(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Integer"
        and len(node.args) == 1
        and not node.keywords
        and _is_integer(node.args[0], _MOST_POWER)
    )


def _is_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _is_integer(node: ast.expr, most: int) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= most


def _is_decimal(node: ast.expr) -> bool:
    text = node.value if isinstance(node, ast.Constant) else None
    return (
        isinstance(text, str)
        and re.fullmatch(r"-?[0-9]{1,30}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,3})?", text) is not None
    )


_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)


def _is_condition(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(map(_is_condition, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _is_condition(node.operand)
    return (
        isinstance(node, ast.Compare)
        and all(isinstance(op, _COMPARISONS) for op in node.ops)
        and all(map(_is_number, (node.left, *node.comparators)))
    )


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, _ARITHMETIC) and _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.Constant):
        return _is_integer(node, _LARGEST)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        known = node.func.id in ("Max", "Min", "FloorDiv", "Mod", "PythonMod")
        return known and not node.keywords and all(map(_is_number, node.args))
    # L['x'].size()[0]
    if isinstance(node, ast.Subscript) and _is_integer(node.slice, 100) and isinstance(node.value, ast.Call):
        asked = node.value
        return (
            not asked.args
            and not asked.keywords
            and isinstance(asked.func, ast.Attribute)
            and asked.func.attr in ("size", "stride")
            and _is_input(asked.func.value)
        )
    return False


def _is_input(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "L"
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    key = node.slice.value
    named = isinstance(key, str) and _NAME.fullmatch(key) is not None
    return (named or _is_integer(node.slice, 10_000)) and _is_input(node.value)
