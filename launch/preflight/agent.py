"""The preflight's process on a node: does the steps of all checks as its standard input asks.

Every line of input is a round ``{"round": N, "asked": {...}, "told": {check: {node: answer}}}``;
every line of output that begins with `MARK` answers one. The end of the input ends it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from mm.launch.preflight.check import Asked
from mm.launch.preflight.checks import CHECKS
from mm.reading import parse_json

MARK = "mm-preflight "


def answer(words: dict[str, Any]) -> dict[str, Any]:
    """Do one round: check -> what its step gave."""
    given = words["asked"]
    asked = Asked(**{**given, "overrides": tuple(given["overrides"])})
    number, out = words["round"], {}
    for check in CHECKS:
        step = check.steps[number] if number < len(check.steps) else None
        if step is None or check.name in words["without"]:
            continue
        told = {int(i): value for i, value in words["told"].get(check.name, {}).items()}
        try:
            out[check.name] = step(asked, told)
        except Exception as error:  # one check's trouble is not another's
            out[check.name] = {"error": f"{type(error).__name__}: {error}"}
    return out


def main() -> None:
    """Answer until the input ends."""
    import time

    for line in sys.stdin:
        words = parse_json(line)
        if words["round"] < 0:  # how far is it, and what time is it there?
            said: Any = {"time": time.time()}
        else:
            said = answer(words)
        sys.stdout.write(f"{MARK}{json.dumps(said)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
