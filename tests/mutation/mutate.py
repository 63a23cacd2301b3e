"""One-line mutants of a Python file: small changes inside functions that a test should notice.

A mutant is text: the source with one expression or statement replaced, all other lines as they are.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import NamedTuple

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil"}
SAID = {"log", "warnings", "logging"}  # calls of these only tell: no test need hold their words


class Mutant(NamedTuple):
    """One change of one file.

    ``key`` names it free of line numbers: function, what was there, what is there, and which of
    several such places it is.
    """

    line: int
    key: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a file, in the order of their places."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()
    at = lambda line, column: starts[line - 1] + column
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    for function, node, changed in _changes(tree):
        begin = at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        before, after = raw[begin:end].decode(), ast.unparse(changed)
        if isinstance(node, ast.expr) and not isinstance(node, (ast.Constant, ast.Name)):
            after = f"({after})"
        after += "\n" * before.count("\n") if isinstance(node, ast.stmt) else ""
        name = f"{function}: {_short(before)} -> {_short(after)}"
        seen[name] = seen.get(name, -1) + 1
        key = f"{name} #{seen[name]}"
        text = (raw[:begin] + after.encode() + raw[end:]).decode()
        try:
            ast.parse(text)
        except SyntaxError:  # the brackets of an expression over several lines
            continue
        found.append(Mutant(node.lineno, key, text))  # type: ignore[attr-defined]
    return found


def _short(text: str) -> str:
    return " ".join(text.split())[:90]


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(name of the function, node, what stands in its place) inside all functions."""

    def functions(node: ast.AST, path: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path}{child.name}", child
            elif isinstance(child, (ast.ClassDef, ast.If)):
                name = f"{path}{child.name}." if isinstance(child, ast.ClassDef) else path
                yield from functions(child, name)

    for name, function in functions(tree, ""):
        for node in _inside(function):
            for changed in _of_node(node):
                yield name, node, changed


def _inside(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function's body but its text: docstrings, annotations, messages, assertions."""
    stack = list(reversed(function.body))  # type: ignore[attr-defined]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and _root(node.func) in SAID:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if _root(node.value.func) in SAID:
                continue
        if isinstance(node, ast.If) and _root(node.test) == "TYPE_CHECKING":
            continue
        yield node
        skipped = {"annotation", "returns", "decorator_list", "ops", "op", "ctx"}
        for field, value in reversed(list(ast.iter_fields(node))):
            if field in skipped:
                continue
            for child in reversed(value if isinstance(value, list) else [value]):
                # `zip(strict=True)` guards against what does not happen
                if isinstance(child, ast.AST) and getattr(child, "arg", None) != "strict":
                    stack.append(child)


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def _of_node(node: ast.AST) -> Iterator[ast.AST]:
    for kind, make in RULES:
        if isinstance(node, kind):
            yield from make(node)


def _compare(node: ast.Compare) -> Iterator[ast.AST]:
    if len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators)


def _arithmetic(node: ast.BinOp) -> Iterator[ast.AST]:
    text = any(isinstance(n, (ast.JoinedStr, ast.Constant)) and not _number(n)
               for n in (node.left, node.right))  # fmt: skip
    if type(node.op) in ARITHMETIC and not text:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _number(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _boolean(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)


def _unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    if isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    # Settings of classifiers and the like, 10.0 for 11.0, say nothing about a test.
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int) and abs(node.value) <= 2:
        yield ast.Constant(node.value + 1)


def _condition(node: ast.If | ast.IfExp) -> Iterator[ast.AST]:
    if isinstance(node, ast.IfExp) and not isinstance(node.test, ast.Compare):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _name(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in SWAPPED_NAMES:
        yield ast.Call(ast.Name(SWAPPED_NAMES[function.id]), node.args, node.keywords)
    elif isinstance(function, ast.Attribute) and function.attr in SWAPPED_NAMES:
        swapped = ast.Attribute(function.value, SWAPPED_NAMES[function.attr])
        yield ast.Call(swapped, node.args, node.keywords)


def _statement(node: ast.Expr | ast.AugAssign) -> Iterator[ast.AST]:
    if isinstance(node, ast.AugAssign) or isinstance(node.value, ast.Call):
        yield ast.Pass()


RULES: tuple[tuple[type | tuple[type, ...], Callable[..., Iterator[ast.AST]]], ...] = (
    (ast.Compare, _compare),
    (ast.BinOp, _arithmetic),
    (ast.BoolOp, _boolean),
    (ast.UnaryOp, _unary),
    (ast.Constant, _constant),
    (ast.IfExp, _condition),
    (ast.Call, _name),
    ((ast.Expr, ast.AugAssign), _statement),
)
