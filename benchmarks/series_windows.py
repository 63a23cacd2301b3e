"""Windows of a real time series as files, for `benchmarks/members.py`.

    python benchmarks/series_windows.py WHEEL OUT.tar

WHEEL is a wheel of pmdarima, which carries a public table: Taylor's demand for electricity in
England and Wales in 2000, 4,032 half hours (Taylor 2003, J. Oper. Res. Soc. 54). Nothing is
installed. The first ten weeks train; forecasts of the last two are the test.
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
import zipfile
from pathlib import Path

WEEK = 336  # half hours
CONTEXT = 2 * WEEK
HORIZON = 48
TRAIN = 10 * WEEK
MEMBER = "pmdarima/datasets/taylor.py"


def read(wheel: Path) -> list[int]:
    """The points of the table."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(MEMBER).decode()
    tables = re.findall(r"array\(\[(.*?)\]", text, re.DOTALL)
    table = max(tables, key=len)  # a shorter one is an example
    return [int(float(word)) for word in re.findall(r"\d+(?:\.\d+)?", table)]


def main() -> None:
    """Write the windows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    points = read(args.wheel)
    size = CONTEXT + HORIZON
    spans = [("train", i) for i in range(0, TRAIN - size + 1, 2)]
    spans += [("test", i) for i in range(TRAIN - CONTEXT, len(points) - size + 1, 12)]
    with tarfile.open(args.out, "w") as archive:
        for split, start in spans:
            body = "".join(f"{x}\n" for x in points[start : start + size]).encode()
            info = tarfile.TarInfo(f"{split}/{start:05d}.series")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    print(f"{len(points)} points, {len(spans)} windows of {size}: {args.out}")


if __name__ == "__main__":
    main()
