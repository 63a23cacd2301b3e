"""Mutants are one change of one line, and of no words."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutants_of  # noqa: E402

SOURCE = '''
def scale(x, n, *, out=None):
    """Doubles, not words: 1 + 1."""
    if x < n and not out:
        x += 1
        log.info("%d", x - 1)
    return max(x * 2, 0)
'''


def test_mutants_change_one_place_and_no_words() -> None:
    found = mutants_of(SOURCE)
    keys = [mutant.key for mutant in found]
    assert keys == [
        "scale: x < n and not out -> (x < n or not out) #0",
        "scale: x < n -> (x <= n) #0",
        "scale: not out -> (out) #0",
        "scale: x += 1 -> pass #0",
        "scale: 1 -> 2 #0",
        "scale: max(x * 2, 0) -> (min(x * 2, 0)) #0",
        "scale: x * 2 -> (x / 2) #0",
        "scale: 2 -> 3 #0",
        "scale: 0 -> 1 #0",
    ]
    for mutant in found:
        pairs = zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
        changed = [i for i, (a, b) in enumerate(pairs, start=1) if a != b]
        assert changed == [mutant.line]
