"""The files of the package and their imports, as the tests of the layout read them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


FOLDERS = ("tokenizers", "data", "kernels", "launch")


# First part of the module's path below `mm` -> tier. A longer prefix wins.
TIERS = {
    "": 0,
    "config": 0,
    "plug_point": 0,
    "registry": 0,
    "vocabulary": 0,
    "specs": 0,
    "names": 0,
    "disk": 0,
    "errors": 0,
    "hashes": 0,
    "processes": 0,
    "reading": 0,
    "schedule": 0,
    "run": 0,
    "engine_config": 0,
    "init_from": 0,
    "kernels": 1,
    "batch": 1,
    "mask": 1,
    "mask_expression": 1,
    "state": 1,
    "layout": 1,
    "shard": 1,
    "model": 2,
    "tokenizers": 3,
    "data": 3,
    "decoders": 4,
    "objectives": 5,
    "tasks": 5,
    "interchange": 5,
    "surgery": 5,
    "trainer": 6,
    "bench": 7,
    "cli": 7,
    "report": 7,
    "sweep": 7,
    "quickstart": 7,
    "own_data": 7,
    "finetune": 7,
    "faults": 7,
    "plan": 7,
    "verify": 7,
    "__main__": 7,
    "launch": -1,  # tier 0 only: it starts before torch
}


def sources() -> list[Path]:
    """Every Python file of the package, by its real path.

    The links would name the four folders twice.
    """
    roots = [ROOT / "mm", *(ROOT / name for name in FOLDERS)]
    return sorted(p for root in roots for p in real_files(root) if p.suffix == ".py")


def real_files(root: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(root, followlinks=False):
        folders[:] = [
            f for f in folders if f != "__pycache__" and not (Path(here) / f).is_symlink()
        ]
        yield from (Path(here) / name for name in files)


def module(file: Path) -> str:
    """Path below ``mm`` in dots: ``kernels.op`` for both mm/kernels/op.py and kernels/op.py."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "mm" else parts
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported module of a file, wherever in it; `from mm import x` counts as mm.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "mm":
                for alias in node.names:
                    yield node, f"mm.{alias.name}"
            else:
                yield node, node.module


def at_top(tree: ast.Module) -> Iterator[str]:
    """Modules that importing the file imports: not inside a function, not under TYPE_CHECKING."""

    def visit(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from (name for _, name in imports(ast.Module([node], [])))
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from visit(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
                for part in ("body", "orelse", "finalbody"):
                    yield from visit(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    yield from visit(handler.body)

    yield from visit(tree.body)


def type_only(tree: ast.Module) -> set[int]:
    """Lines of imports under TYPE_CHECKING: they bind nothing at run time."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= {
                inner.lineno
                for part in node.body
                for inner in ast.walk(part)
                if hasattr(inner, "lineno")
            }
    return lines


def tier(name: str) -> int:
    first = name.split(".")[0]
    assert first in TIERS, f"mm.{name}: no tier for '{first}'; add it to TIERS"
    return TIERS[first]


TREES = {file: ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in sources()}
