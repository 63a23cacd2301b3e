"""Time from a machine's death to training again: `mm launch ssh` on two network namespaces.

    python benchmarks/deaths.py --tries 10 --json deaths.json

Needs root and the packages of the launch tests (tests/launch/machines.py). About a minute a try.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "launch"), str(ROOT / "tests")]

from deaths import DEATHS, run_unbroken, survive  # noqa: E402  # pyright: ignore[reportMissingImports]
from machines import Hosts  # noqa: E402  # pyright: ignore[reportMissingImports]

BAR = 60.0  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(DEATHS), choices=list(DEATHS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected = run_unbroken(root)
        for n in range(asked.tries):
            for death in asked.only:
                rows.append(tried(root, n, death, expected))
                print(f"{n + 1}/{asked.tries} {death}: {rows[-1]}", flush=True)
                if asked.json:
                    asked.json.write_text(json.dumps(rows, indent=1))
    print("| death | tries | lost | median, s | longest, s |\n|---|---:|---:|---:|---:|")
    lost = 0
    for death in asked.only:
        mine = [row for row in rows if row["death"] == death]
        took = [row["seconds"] for row in mine if row["seconds"] is not None]
        lost += len(mine) - len(took)
        times = f"{statistics.median(took):.1f} | {max(took):.1f}" if took else "| "
        print(f"| {death} | {len(mine)} | {len(mine) - len(took)} | {times} |")
    return int(lost > 0 or any(row["seconds"] > BAR for row in rows))


def tried(root: Path, n: int, death: str, expected: dict[int, float]) -> dict[str, Any]:
    """One death of new machines; a run that does not go on as it must has no seconds."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(Path(folder))
        try:
            hosts.up()
            name = f"{death.replace(' ', '_')}_{n}"
            return {"death": death, "seconds": survive(hosts, root, name, death, expected)}
        except AssertionError as error:
            return {"death": death, "seconds": None, "why": str(error)[-2000:]}
        finally:
            hosts.down()


if __name__ == "__main__":
    sys.exit(main())
