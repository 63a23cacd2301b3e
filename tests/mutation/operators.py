"""Operators of mutation: what may stand in the place of one expression or statement.

Each takes a node and yields (node that is replaced, what stands there). Nothing here changes words,
types, or what only makes a run quicker: no test need notice those.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Change = tuple[ast.AST, ast.AST]

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
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_PAIRS = (
    "min max|any all|floor ceil|argmin argmax|amin amax|minimum maximum|zeros ones|tril triu|"
    "zeros_like ones_like|add_ sub_|mul_ div_|sin cos|logical_and logical_or|startswith endswith"
)
SWAPPED_NAMES = {
    a: b
    for pair in _PAIRS.split("|")
    for a, b in (pair.split(), reversed(pair.split()))  # both ways
} | {"mean": "sum", "sorted": "list", "no_grad": "enable_grad", "inference_mode": "enable_grad"}
# `x.detach()` becomes `x`, `abs(x)` becomes `x`.
METHODS_LEFT_OUT = set(
    "detach clone copy abs sqrt square exp clamp clamp_min clamp_max masked_fill flip roll".split()
)
FUNCTIONS_LEFT_OUT = {"abs", "reversed", "deepcopy"}
SAID = {"log", "warnings", "logging", "print", "typer", "console"}  # these only tell
# Keywords of speed, of words, and of settings that change no result of a right program.
IDLE_KEYWORDS = set(
    "strict encoding errors device non_blocking pin_memory num_workers prefetch_factor daemon name "
    "persistent_workers maxsize timeout flush help description desc title message msg category "
    "stacklevel indent max_iter memory_format exist_ok parents ensure_ascii newline".split()
)
# Calls whose loss wastes time, memory or words, and changes no result.
IDLE_CALLS = set(
    "close sleep collect empty_cache synchronize set_num_threads filterwarnings simplefilter "
    "setLevel set_postfix refresh flush __init__ shutdown freeze warn _warn".split()
)
COMMUTATIVE = set(
    "min max equal maximum minimum add mul gcd lcm isinstance issubclass allclose zip print "
    "logical_and logical_or hypot cast".split()
)
PATHS = ("folder", "path", "root", "dir", "out", "to", "into", "here")


def root_of(node: ast.AST) -> str:
    """The name that a chain of attributes and calls begins with."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def changes_of(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(operator, node, what stands in its place) of one node of ``function``."""
    for kind, name, make in OPERATORS:
        if isinstance(node, kind):
            for old, new in make(node, function):
                yield name, old, new


def _last(node: ast.AST) -> str:
    """The last name of a chain: ``fsync`` of ``os.fsync``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _compare(node: ast.Compare, function: str) -> Iterator[Change]:
    for i, op in enumerate(node.ops):
        if type(op) in COMPARE:
            ops = [*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]]
            yield node, ast.Compare(node.left, ops, node.comparators)


def _arithmetic(node: ast.BinOp, function: str) -> Iterator[Change]:
    sides = (node.left, node.right)
    text = any(isinstance(n, (ast.JoinedStr, ast.Constant)) and not _number(n) for n in sides)
    path = isinstance(node.op, ast.Div) and any(_last(n).lower().endswith(PATHS) for n in sides)
    if type(node.op) in ARITHMETIC and not text and not path:
        yield node, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _number(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _boolean(node: ast.BoolOp, function: str) -> Iterator[Change]:
    yield node, ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)


def _unary(node: ast.UnaryOp, function: str) -> Iterator[Change]:
    if isinstance(node.op, (ast.Not, ast.USub)):
        yield node, node.operand


def _constant(node: ast.Constant, function: str) -> Iterator[Change]:
    # Settings of classifiers and the like, 10.0 for 11.0, say nothing about a test.
    value = node.value
    if isinstance(value, bool):
        yield node, ast.Constant(not value)
    elif isinstance(value, int) and abs(value) <= 2:
        yield node, ast.Constant(value + 1)
    elif isinstance(value, float) and value in (0.0, 0.5, 1.0, 2.0):
        yield node, ast.Constant(value + 1)


def _condition(node: ast.If | ast.IfExp | ast.While, function: str) -> Iterator[Change]:
    simple = not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Constant))
    if simple:  # the others have operators of their own
        yield node.test, ast.UnaryOp(ast.Not(), node.test)


def _filter(node: ast.comprehension, function: str) -> Iterator[Change]:
    for test in node.ifs:
        if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            yield test, ast.UnaryOp(ast.Not(), test)


def _call(node: ast.Call, function: str) -> Iterator[Change]:
    called, name = node.func, _last(node.func)
    if name in SWAPPED_NAMES:
        other = SWAPPED_NAMES[name]
        if isinstance(called, ast.Name):
            yield node, ast.Call(ast.Name(other), node.args, node.keywords)
        elif name != "sorted" and isinstance(called, ast.Attribute):
            yield node, ast.Call(ast.Attribute(called.value, other), node.args, node.keywords)
    if isinstance(called, ast.Attribute) and name in METHODS_LEFT_OUT:
        if not isinstance(called.value, ast.Name) or called.value.id not in ("torch", "np", "math"):
            yield node, called.value
    if isinstance(called, ast.Name) and name in FUNCTIONS_LEFT_OUT and len(node.args) == 1:
        yield node, node.args[0]
    if name == "range" and node.args and not isinstance(node.args[-1], ast.Constant):
        stop = node.args[-1] if len(node.args) < 3 else node.args[1]
        yield stop, ast.BinOp(stop, ast.Sub(), ast.Constant(1))


def _arguments(node: ast.Call, function: str) -> Iterator[Change]:
    """The first two arguments in the other order."""
    plain = (ast.Name, ast.Attribute, ast.Subscript)
    if len(node.args) >= 2 and _last(node.func) not in COMMUTATIVE:
        a, b, *rest = node.args
        if isinstance(a, plain) and isinstance(b, plain) and ast.dump(a) != ast.dump(b):
            yield node, ast.Call(node.func, [b, a, *rest], node.keywords)


def _keywords(node: ast.Call, function: str) -> Iterator[Change]:
    """A keyword left out, so that the default stands there."""
    for keyword in node.keywords:
        nothing = isinstance(keyword.value, ast.Constant) and keyword.value.value in (None, "")
        if keyword.arg is not None and keyword.arg not in IDLE_KEYWORDS and not nothing:
            rest = [k for k in node.keywords if k is not keyword]
            yield node, ast.Call(node.func, node.args, rest)


def _slice(node: ast.Slice, function: str) -> Iterator[Change]:
    for bound, op in ((node.lower, ast.Add()), (node.upper, ast.Sub())):
        if bound is not None and not isinstance(bound, (ast.Constant, ast.UnaryOp)):
            yield bound, ast.BinOp(bound, op, ast.Constant(1))


def _statement(node: ast.stmt, function: str) -> Iterator[Change]:
    """A call for its effect, an in-place sum, an assignment to a part, a refusal: left out."""
    if isinstance(node, ast.Expr):
        wanted = isinstance(node.value, ast.Call) and _last(node.value.func) not in IDLE_CALLS
    elif isinstance(node, ast.Assign):
        part = all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in node.targets)
        wanted = part and not function.endswith(("__init__", "__post_init__"))
    elif isinstance(node, ast.Raise):
        wanted = node.exc is not None and "NotImplemented" not in ast.unparse(node.exc)
    else:
        wanted = True
    if wanted:
        yield node, ast.Pass()


def _jump(node: ast.Break | ast.Continue, function: str) -> Iterator[Change]:
    yield node, ast.Break() if isinstance(node, ast.Continue) else ast.Pass()


OPERATORS: tuple[tuple[type | tuple[type, ...], str, Callable[..., Iterator[Change]]], ...] = (
    (ast.Compare, "comparison", _compare),
    (ast.BinOp, "arithmetic", _arithmetic),
    (ast.BoolOp, "and, or", _boolean),
    (ast.UnaryOp, "not, minus", _unary),
    (ast.Constant, "constant", _constant),
    ((ast.If, ast.IfExp, ast.While), "condition", _condition),
    (ast.comprehension, "condition", _filter),
    (ast.Call, "call", _call),
    (ast.Call, "argument order", _arguments),
    (ast.Call, "keyword", _keywords),
    (ast.Slice, "bound", _slice),
    ((ast.Expr, ast.Assign, ast.AugAssign, ast.Raise), "statement", _statement),
    ((ast.Break, ast.Continue), "jump", _jump),
)
