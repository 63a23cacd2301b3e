"""A sample of one-line mutants, other ones at every commit: nearly all are caught."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutants_of  # noqa: E402
from run import run  # noqa: E402

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_of_this_commit_is_caught(tmp_path: Path) -> None:
    """30 mutants drawn by the commit's hash; with 92 % caught, more than 6 are rare."""
    rows = run(sample=30, seed="HEAD", quick=True, build=tmp_path)
    alive = [row["key"] for row in rows if not row["caught"]]
    assert len(rows) == 30 and len(alive) <= 6, "\n".join(alive)
