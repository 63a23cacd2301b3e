"""Damage as hypothesis strategies: edits of JSON trees, of bytes, of columns of numbers.

An edit is drawn without seeing the file, as numbers that pick a place in whatever is there, so that
a failing example shrinks to few small edits.
"""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

WORDS = (
    "", ".", "..", "../../x", "/etc/passwd", "~", "text", "image", "²", "a\nb", "\x00", "x" * 5000,
    "!!python/object/apply:os.system ['true']", "${HOME}", "nan", "1e999", "con.tar", "\ud7ff",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324,
           float("inf"), float("-inf"), float("nan"))  # fmt: skip
DEEP = "<nested>"  # stands for a list in a list in a list, which no message could show


def _deep(depth: int = 150) -> Any:
    out: Any = None
    for _ in range(depth):
        out = [out]
    return out


leaves = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers()
)
values = st.one_of(
    leaves,
    st.lists(leaves, max_size=3),
    st.dictionaries(st.sampled_from(WORDS[:10]), leaves, max_size=3),
    st.just(DEEP),
)
places = st.integers(0, 10**6)
tree_edits = st.lists(
    st.tuples(places, st.sampled_from(["set", "set", "drop", "twice", "rename"]), values),
    min_size=1,
    max_size=4,
)
byte_edits = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "repeat"]), places, places),
    min_size=1,
    max_size=6,
)


def edit_tree(tree: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """A copy of a JSON tree with edits at the places that their numbers pick.

    Odd numbers pick among what lies near the top, which few nodes are.
    """
    tree = copy.deepcopy(tree)
    for number, what, value in edits:
        value = _deep() if value == DEEP else value
        nodes = list(_nodes(tree))
        if not nodes:
            return value
        near = nodes[: max(8, len(nodes) // 10)] if number % 2 else nodes
        holder, key = near[number // 2 % len(near)]
        if what == "set":
            holder[key] = value
        elif what == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif what == "rename":
            holder[str(value)[:20]] = holder.pop(key)
        else:
            holder[f"{key}_"] = copy.deepcopy(holder[key])
    return tree


def _nodes(tree: Any) -> Any:
    """(holder, key) of every node, level by level."""
    level = [tree]
    while level:
        below = []
        for holder in level:
            if isinstance(holder, dict):
                pairs = list(holder.items())
            else:
                pairs = list(enumerate(holder)) if isinstance(holder, list) else []
            for key, value in pairs:
                yield holder, key
                below.append(value)
        level = below


def edit_bytes(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Bytes with edits at the places that their numbers pick."""
    out = bytearray(data)
    for what, place, number in edits:
        at = place % (len(out) + 1)
        if what == "flip" and out:
            out[at % len(out)] ^= 1 << number % 8
        elif what == "set" and out:
            out[at % len(out)] = number % 256
        elif what == "cut":
            del out[at : at + 1 + number % 64]
        elif what == "insert":
            out[at:at] = (number % 2**32).to_bytes(4, "little")
        elif what == "repeat":
            out[at:at] = out[at : at + number % 512]
    return bytes(out)
