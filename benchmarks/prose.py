"""Prose for a small language model: Shakespeare and the docstrings of installed packages.

    python benchmarks/prose.py DIR --out prose.jsonl

DIR holds tinyshakespeare.txt. Writes a row a docstring of 400 characters or more that is prose:
most of its lines begin without code marks; and scenes of about 2,000 characters. The licences are
the packages' own: what is written is for this machine, not to be handed on.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("torch", "numpy", "sklearn", "scipy", "matplotlib", "pydantic")
LEAST = 400  # characters of a docstring
SCENE = 2000  # of a piece of the plays
MARKS = re.compile(r"^\s*(>>>|\.\.\.|[|+=-]{3}|::|\$|@|[\[{(<])")


def docstrings(folder: Path) -> Iterator[str]:
    """Of every function, class and module below a folder, in the order of the files."""
    for file in sorted(folder.rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, RecursionError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def is_prose(text: str) -> bool:
    """Long, and with few lines of code or tables."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(text) >= LEAST and sum(bool(MARKS.match(line)) for line in lines) * 4 < len(lines)


def scenes(play: str) -> Iterator[str]:
    """Speeches, joined to pieces of about `SCENE` characters."""
    piece = ""
    for speech in play.split("\n\n"):
        piece += speech + "\n\n"
        if len(piece) >= SCENE:
            yield piece
            piece = ""
    if piece:
        yield piece


def main() -> None:
    """Write the rows, and say how much there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("prose.jsonl"))
    args = parser.parse_args()
    play = (args.source / "tinyshakespeare.txt").read_text(encoding="utf-8")
    texts = dict.fromkeys(scenes(play))
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            texts |= dict.fromkeys(filter(is_prose, docstrings(Path(spec.origin).parent)))
    rows = (json.dumps({"text": text.encode(errors="replace").decode()}) for text in texts)
    args.out.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
