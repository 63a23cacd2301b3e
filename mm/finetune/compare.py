"""Base and tuned model beside each other: figures of both, and what the tuning cost.

`comparison.json` of the run folder: ``rows`` and ``cost``; the report page shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.reading import parse_json

TUNED, BASE, COMPARISON = "results.json", "results-base.json", "comparison.json"
OF_BASE = "base."  # how tasks of the base's own data are called


def compare(run: Path) -> dict[str, Any]:
    """Write and return the comparison of a run whose tasks both models have done.

    Raises:
        UserError: a file of figures is missing or damaged.
    """
    tuned, base = (_figures(run / name) for name in (TUNED, BASE))
    rows = []
    for key, row in tuned.items():
        before = base.get(key)
        if before is not None:
            same = {k: row[k] for k in ("name", "unit", "chance", "n") if k in row}
            task = str(row.get("task", ""))
            whose = "base" if task.startswith(OF_BASE) else "own"
            values = {"base": before["value"], "tuned": row["value"]}
            rows.append({**same, "name": row["name"].rpartition("/")[2], "of": whose, **values})
    found = {"rows": rows, "cost": cost(run)}
    part = run / f"{COMPARISON}.part"
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.replace(run / COMPARISON)
    return found


def cost(run: Path) -> dict[str, Any]:
    """Parameters, steps, tokens, seconds and peak memory of the training."""
    start = parse_json((run / "start.json").read_bytes())
    seconds = tokens = 0.0
    steps, peak = 0, {}
    for line in _lines(run / "metrics.jsonl"):
        taken = line.get("perf/step_seconds")
        if not isinstance(taken, (int, float)):
            continue
        steps = max(steps, int(line.get("step", 0)))
        seconds += taken
        tokens += taken * (line.get("perf/tokens_per_second") or 0.0)
        for name in ("memory/peak_mib", "memory/host_peak_mib"):
            if isinstance(line.get(name), (int, float)):
                peak[name] = max(peak.get(name, 0.0), line[name])
    where, mib = next(iter(sorted(peak.items(), key=lambda each: "host" in each[0])), ("", None))
    total, trained = (sum(start.get(k, {}).values()) for k in ("parameters", "trained"))
    return {
        "parameters": total,
        "trained_parameters": trained,
        "steps": steps,
        "tokens": round(tokens),
        "seconds": round(seconds, 1),
        "peak_memory_mib": mib and round(mib),
        "peak_memory_of": "process" if "host" in where else "device" if where else None,
    }


def _figures(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    try:
        found = parse_json(file.read_bytes())
        return {(str(row.get("task", "")), str(row["name"])): row for row in found["figures"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no figures ({error}); make them with: mm eval") from error


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = parse_json(line)
        except ValueError:  # cut by a kill
            continue
        if isinstance(row, Mapping):
            yield row
