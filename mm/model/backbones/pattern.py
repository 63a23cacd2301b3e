"""The pattern language.

`2*rg_lru local_attention`, groups `2*(a b) c`, repeated to the depth of the stack.
"""

from __future__ import annotations

import re

from mm.errors import UserError

MAX_LAYERS = 4096
MAX_NESTING = 16
_TOKEN = re.compile(r"\s*(?:(\d+)\s*\*|([A-Za-z_][\w\-./]*)|(\()|(\)))")


def parse(pattern: str) -> list[str]:
    """Expand a pattern to its words, left to right. Raises UserError pointing at the fault."""
    words, at = _sequence(pattern, 0, 0)
    if not words:
        raise UserError(f"pattern '{pattern}' names no mixer")
    return words


def _sequence(text: str, at: int, nested: int) -> tuple[list[str], int]:
    if nested > MAX_NESTING:
        raise _fault(text, at, f"groups are nested deeper than {MAX_NESTING}")
    words: list[str] = []
    times: int | None = None
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if not match:
            raise _fault(text, at, "expected a word, a number with *, or a parenthesis")
        number, word, opened, closed = match.groups()
        if number:
            if times is not None or not number.strip("0"):
                raise _fault(text, at, "a repeat count is a positive number before a word or group")
            if len(number.lstrip("0")) > 9:  # int() of a stranger's 5,000 digits raises
                raise _fault(text, at, f"more than {MAX_LAYERS} layers")
            times, at = int(number), match.end()
            continue
        if closed:
            if not nested or times is not None:
                raise _fault(text, at, "nothing to close here")
            return words, match.end()
        inside = match.end()
        group, at = _sequence(text, inside, nested + 1) if opened else ([word], inside)
        if len(words) + len(group) * (times or 1) > MAX_LAYERS:
            raise _fault(text, inside, f"more than {MAX_LAYERS} layers")
        words += group * (times or 1)
        times = None
    if nested:
        raise _fault(text, at, "a group is not closed")
    if times is not None:
        raise _fault(text, at, "a repeat count is a positive number before a word or group")
    return words, at


def _fault(text: str, at: int, why: str) -> UserError:
    shown = text if len(text) <= 120 else f"{text[:120]}..."
    return UserError(f"pattern '{shown}', character {min(at, len(text)) + 1}: {why}")


def tile(words: list[str], depth: int | None) -> list[str]:
    """Repeat ``words`` to ``depth`` layers, the last round cut where needed; None takes them once.

    Raises UserError when the pattern alone is longer than ``depth``: part of it would never be
    built.
    """
    if depth is None:
        return words
    if len(words) > depth:
        raise UserError(
            f"the pattern has {len(words)} layers, depth is {depth}; shorten it or raise depth"
        )
    return [words[i % len(words)] for i in range(depth)]
