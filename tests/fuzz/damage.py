"""Damage drawn at random: edits of JSON trees, of bytes, of columns of numbers.

An edit is drawn without seeing the file, as numbers that pick a place in whatever is there, so that
a failing example shrinks to few small edits. All draws come from one `random.Random`, which costs
microseconds; the default suite hands in hypothesis's, which shrinks.
"""

from __future__ import annotations

import copy
from random import Random
from typing import Any

WORDS = (
    "", ".", "..", "../../x", "/etc/passwd", "~", "text", "image", "²", "a\nb", "\x00",
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "&a [*a, *a]",
    "${HOME}", "nan", "1e999", "con.tar", "\ud7ff", "True", "x\u202ey",
)  # fmt: skip
# Half a character, which no file name and no UTF-8 can hold; what no message may echo whole.
HARD_WORDS = (
    "\ud800", "a\udcffb", "\udfff\ud800", "../\udc80", "x" * 5_000, "x" * 200_000, "/" * 5_000,
    "a/" * 3_000, "é" * 300,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 2**16, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324,
           float("inf"), float("-inf"), float("nan"))  # fmt: skip
DEEP = "<nested>"  # stands for a list in a list in a list, which no message could show
MANY = "<many>"  # for a list of three thousand


def _deep(depth: int = 150) -> Any:
    out: Any = None
    for _ in range(depth):
        out = [out]
    return out


def _leaf(draw: Random) -> Any:
    kind = draw.randrange(8)
    if kind < 3:
        return NUMBERS[draw.randrange(len(NUMBERS))]
    if kind < 5:
        return WORDS[draw.randrange(len(WORDS))]
    if kind == 5:
        return HARD_WORDS[draw.randrange(len(HARD_WORDS))]
    if kind == 6:
        return (None, False, True)[draw.randrange(3)]
    return draw.getrandbits(1 << draw.randrange(8)) - draw.randrange(1000)


def _value(draw: Random) -> Any:
    kind = draw.randrange(64)
    if kind < 48:
        return _leaf(draw)
    if kind < 55:
        return [_leaf(draw) for _ in range(draw.randrange(4))]
    if kind < 62:
        words = (*WORDS[:10], HARD_WORDS[draw.randrange(len(HARD_WORDS))])
        return {words[draw.randrange(len(words))]: _leaf(draw) for _ in range(draw.randrange(4))}
    return (DEEP, MANY)[kind - 62]


TreeEdit = tuple[int, str, Any]
ByteEdit = tuple[str, int, int]


def tree_edits(draw: Random) -> list[TreeEdit]:
    """One to four edits (place, what, value)."""
    what = ("set", "set", "set", "drop", "twice", "rename")
    return [
        (draw.randrange(10**6), what[draw.randrange(len(what))], _value(draw))
        for _ in range(1 + draw.randrange(4))
    ]


def byte_edits(draw: Random) -> list[ByteEdit]:
    """One to six edits (what, place, number)."""
    what = ("flip", "set", "cut", "insert", "repeat", "word")
    return [
        (what[draw.randrange(len(what))], draw.randrange(10**6), draw.getrandbits(32))
        for _ in range(1 + draw.randrange(6))
    ]


def tree_or_byte_edits(draw: Random) -> tuple[list[TreeEdit], list[ByteEdit]]:
    """Edits of the tree that a file holds, or (one in four) of its bytes; the others are empty."""
    if draw.randrange(4):
        return tree_edits(draw), []
    return [], byte_edits(draw)


def edit_tree(tree: Any, edits: list[TreeEdit]) -> Any:
    """A copy of a JSON tree with edits at the places that their numbers pick.

    Odd numbers pick among what lies near the top, which few nodes are.
    """
    tree = copy.deepcopy(tree)
    for number, what, value in edits:
        value = _deep() if value == DEEP else [0] * 3_000 if value == MANY else value
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
            holder[word_of(value)] = holder.pop(key)
        else:
            holder[f"{key}_"] = copy.deepcopy(holder[key])
    return tree


def word_of(value: Any) -> str:
    """A name made of a value: strings as they are, others cut."""
    return value if isinstance(value, str) else str(value)[:20]


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


def edit_bytes(data: bytes, edits: list[ByteEdit]) -> bytes:
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
        elif what == "word":
            words = (*WORDS, *HARD_WORDS)
            out[at:at] = words[number % len(words)].encode(errors="surrogatepass")
    return bytes(out)
