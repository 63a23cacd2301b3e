"""Names: no public function or method of the package is a bare past participle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from source_tree import ROOT, TREES

IRREGULAR = set(
    "borne built bought brought caught chosen done drawn driven fallen found given gone grown held "
    "kept known laid left lost made meant met paid said seen sent shown spent spoken stood sunk "
    "taken taught thought thrown told understood won worn woven written".split()
)
# A word in -ed that is no past participle, or the fixed term of what the function computes.
ALLOWED = {
    "allowed": "the predicate of a mask: `mask.allowed(query, key)`",
    "embed": "the verb",
    "feed": "the verb: input for a reader that takes it piece by piece, as in `HTMLParser.feed`",
    "cached": "what a pass makes once and hands out again, as in `functools.cached_property`",
    "scheduled": "an objective's values of a step that follow a schedule, as in `Ctx.scheduled`",
    "unsharded": "a context with whole parameters, as after FSDP2's `unshard`",
}


def participle(name: str) -> bool:
    """Whether ``name`` is one word, and that a past participle."""
    word = name.strip("_").lower()
    return bool(re.fullmatch(r"[a-z]+ed", word)) or word in IRREGULAR


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes; not those inside functions."""
    bodies: list[list[ast.stmt]] = [tree.body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.ClassDef):
                bodies.append(node.body)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node


def test_no_public_function_is_named_by_a_bare_past_participle() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for file, tree in TREES.items()
        for node in public_functions(tree)
        if participle(node.name) and node.name not in ALLOWED
    ]
    assert not found, "name it by what it does or gives:\n" + "\n".join(found)


def test_the_list_of_allowed_words_has_no_idle_entry() -> None:
    names = {node.name for tree in TREES.values() for node in public_functions(tree)}
    assert names >= set(ALLOWED)
