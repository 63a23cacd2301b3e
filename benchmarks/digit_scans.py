"""Scanned digits as arrays of floats, .npy, a folder a word: for `benchmarks/members.py`.

    python benchmarks/digit_scans.py DIR [--test 500]

scikit-learn's `load_digits`: 1,797 real scans of 8 x 8 numbers from 0 to 16, of 43 writers
(Alpaydin & Kaynak 1998), to DIR/digit-scans. As many of each digit are the test part; writers are
in both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "zero one two three four five six seven eight nine".split()


def main() -> None:
    """Write the folder."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--test", type=int, default=500)
    args = parser.parse_args()
    scans: Any = load_digits()
    rng, root = np.random.default_rng(0), args.out / "digit-scans"
    for digit, word in enumerate(WORDS):
        of_it = rng.permutation(np.flatnonzero(scans.target == digit))
        for number, i in enumerate(of_it):
            split = "test" if number < args.test // len(WORDS) else "train"
            folder = root / split / word
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i:04d}.npy", scans.images[i])
    print(f"{len(scans.images)} scans, {args.test} of them the test part: {root}")


if __name__ == "__main__":
    main()
