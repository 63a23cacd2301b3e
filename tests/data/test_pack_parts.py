"""Parts of packing by hand: keys, histograms, what makes a duplicate."""

from __future__ import annotations

import numpy as np

from mm.data.pack.worker import content
from mm.data.pack.writer import histogram, safe_key


def test_safe_key_is_injective() -> None:
    names = [
        "a.b",
        "a_b",
        "a%2Eb",
        "a b",
        "a\nb",
        "é",
        "e",
        "x/y.z",
        "x/y/z",
        "../a",
        "漢" * 60,
        "漢" * 61,
        "a" * 300,
    ]
    keys = [safe_key(n) for n in names]
    assert len(set(keys)) == len(names)
    assert all(
        len(k) <= 80 and "." not in k and "\n" not in k and not k.startswith("/") for k in keys
    )


def test_histogram_by_power_of_two() -> None:
    lengths = np.array([0, 0, 1, 2, 3, 4, 63, 64, 127, 128])
    assert histogram(lengths) == {"0": 2, "1": 1, "2": 2, "4": 1, "32": 1, "64": 2, "128": 1}


def test_duplicates_are_told_by_what_belongs_to_which_member() -> None:
    """Bytes that run on from one member into the next are no duplicate."""
    of = lambda dedupe="sample", **raws: content(raws, dedupe)
    assert of(image=b"ab", text=b"c") != of(image=b"a", text=b"bc")
    assert of(image=b"a") != of(text=b"a")
    assert of(image=b"a", text=b"b") == of(text=b"b", image=b"a")
    assert of("text", image=b"a", text=b"b") == of("text", image=b"x", text=b"b") != b""
    assert of("audio", text=b"b") == b"" == of(None, text=b"b")
