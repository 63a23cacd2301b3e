"""One-line mutants of a Python file: small changes inside functions that a test should notice.

A mutant is text: the source with one expression or statement replaced, all other lines as they are.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from operators import IDLE_KEYWORDS, SAID, changes_of, root_of

TELLS = {"__repr__", "__str__", "_warn", "_bar", "describe", "smallest"}  # they make words


class Mutant(NamedTuple):
    """One change of one file.

    ``key`` names it free of line numbers: function, what was there, what is there, and which of
    several such places it is. ``line`` and ``last_line`` hold the statement it is in, without the
    body that belongs to it. ``within`` is a digest of the function.
    """

    line: int
    last_line: int
    key: str
    within: str
    operator: str
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
    for key, body, span, operator, node, changed in _named(tree):
        begin = at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        before, after = raw[begin:end].decode(), ast.unparse(changed)
        kept = "\n" * before.count("\n")  # the lines below keep their numbers
        if isinstance(node, ast.stmt):
            after += kept
        elif kept or not isinstance(changed, (ast.Constant, ast.Name)):
            after = f"({after}{kept})"
        text = (raw[:begin] + after.encode() + raw[end:]).decode()
        try:
            ast.parse(text)
        except SyntaxError:  # a target in brackets, and the like
            continue
        found.append(Mutant(*span, key, digest(body), operator, text))
    return found


def keys_of(source: str) -> set[str]:
    """The keys of all mutants of a file, without the texts, which cost most."""
    return {key for key, *_ in _named(ast.parse(source))}


def _named(
    tree: ast.Module,
) -> Iterator[tuple[str, str, tuple[int, int], str, ast.AST, ast.AST]]:
    """(key, text of the function, lines of the statement, operator, node, what stands there)."""
    seen: dict[str, int] = {}
    for (function, body), span, operator, node, changed in _changes(tree):
        name = f"{function}: {' -> '.join(_shortened(ast.unparse(node), ast.unparse(changed)))}"
        seen[name] = seen.get(name, -1) + 1
        yield f"{name} #{seen[name]}", body, span, operator, node, changed


def digest(*texts: str | bytes) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text if isinstance(text, bytes) else text.encode())
        whole.update(b"\0")
    return whole.hexdigest()[:12]


def _shortened(before: str, after: str, most: int = 80) -> tuple[str, str]:
    """Both texts on one line, cut to the part that differs."""
    before, after = " ".join(before.split()), " ".join(after.split())
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - 30) if max(len(before), len(after)) > most else 0
    cut = lambda text: ("…" if start else "") + text[start : start + most]
    return cut(before), cut(after)


def _changes(
    tree: ast.Module,
) -> Iterator[tuple[tuple[str, str], tuple[int, int], str, ast.AST, ast.AST]]:
    """(function and its text, lines of the statement, operator, node, what stands there)."""

    def functions(node: ast.AST, path: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                words = {root_of(d) for d in child.decorator_list}
                if child.name not in TELLS and not words & {"overload", "abstractmethod"}:
                    yield f"{path}{child.name}", child
            elif isinstance(child, (ast.ClassDef, ast.If)):
                name = f"{path}{child.name}." if isinstance(child, ast.ClassDef) else path
                yield from functions(child, name)

    for name, function in functions(tree, ""):
        text = ast.unparse(function)
        for statement in function.body:  # type: ignore[attr-defined]
            for span, node in _inside(statement, (0, 0)):
                for operator, old, new in changes_of(node, name):
                    yield (name, text), span, operator, old, new


def _inside(node: ast.AST, span: tuple[int, int]) -> Iterator[tuple[tuple[int, int], ast.AST]]:
    """Nodes of a function's body but its text: docstrings, annotations, messages, assertions."""
    if isinstance(node, (ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and (root_of(node.func) in SAID or root_of(node.func) == "cast"):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("_warn", "warning"):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
        if root_of(node.value) in SAID:
            return
    if isinstance(node, ast.If) and root_of(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, (ast.stmt, ast.ExceptHandler)):
        body = getattr(node, "body", None)
        last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
        span = (node.lineno, last)
    yield span, node
    if isinstance(node, ast.Raise):
        return
    skipped = {"annotation", "returns", "decorator_list", "ops", "op", "ctx"}
    for field, value in ast.iter_fields(node):
        if field in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            idle = getattr(child, "arg", None) in IDLE_KEYWORDS and isinstance(child, ast.keyword)
            if isinstance(child, ast.AST) and not idle:
                yield from _inside(child, span)
