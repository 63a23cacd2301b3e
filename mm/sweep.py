"""A sweep: settings of trials by grid or at random, from a YAML as W&B has it; their results."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import UserError, did_you_mean
from mm.reading import parse_json

KNOWN = ("name", "method", "metric", "parameters", "seed", "program", "command", "run_cap")
DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform", "q_uniform")
DEFAULT = 10  # trials of a random search


@dataclass(frozen=True)
class Sweep:
    """What to try.

    Attributes:
        parameters: dotted key of the config -> ``values``, ``value``, or ``min`` and ``max`` with a
            ``distribution``.
        metric: a key of metrics.jsonl; the last value of it counts.
        definition: as W&B takes it.
    """

    name: str
    method: str
    metric: str
    minimize: bool
    parameters: Mapping[str, Mapping[str, Any]]
    seed: int
    definition: Mapping[str, Any]

    @classmethod
    def of(cls, given: Any, origin: str, name: str) -> Sweep:
        """Check a sweep's YAML. Raises UserError that names the key."""
        if not isinstance(given, Mapping):
            raise UserError(f"{origin}: a sweep is method, metric and parameters")
        for key in given:
            if key not in KNOWN:
                raise UserError(f"{origin}: unknown key '{key}'{did_you_mean(str(key), KNOWN)}")
        method = given.get("method", "grid")
        if method not in ("grid", "random", "bayes"):
            raise UserError(f"{origin}: method: grid, random, or (with --wandb) bayes")
        metric = given.get("metric", {"name": "val/loss"})
        if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
            raise UserError(f"{origin}: metric: needs name, such as val/loss, and goal")
        goal = metric.get("goal", "minimize")
        if goal not in ("minimize", "maximize"):
            raise UserError(f"{origin}: metric.goal: minimize or maximize")
        parameters = given.get("parameters")
        if not isinstance(parameters, Mapping) or not parameters:
            raise UserError(f"{origin}: parameters: needs a key of the config, such as model.depth")
        for key, one in parameters.items():
            _check(f"{origin}: parameters.{key}", one, method)
        definition = {**given, "method": method, "metric": {**metric, "goal": goal}}
        seed = int(given.get("seed", 0))
        definition.pop("seed", None)
        return cls(
            name, method, metric["name"], goal == "minimize", dict(parameters), seed, definition
        )

    def trials(self, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Settings of each trial; the same ones every time. Raises UserError for `bayes`."""
        if self.method == "bayes":
            raise UserError("method bayes: W&B chooses by what it has seen: add --wandb")
        if self.method == "grid":
            each = [p.get("values", [p.get("value")]) for p in self.parameters.values()]
            made = (dict(zip(self.parameters, v, strict=True)) for v in itertools.product(*each))
            yield from itertools.islice(made, count)
            return
        for i in range(count or DEFAULT):
            rng = random.Random(f"{self.seed} {i}")
            yield {key: _draw(one, rng) for key, one in self.parameters.items()}

    def rank(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Trials, the best first; those without a result last."""
        sign = 1 if self.minimize else -1
        worst = lambda v: v is None or not math.isfinite(v)
        key = lambda row: math.inf if worst(row[self.metric]) else sign * row[self.metric]
        return sorted(rows, key=key)

    def write_table(self, file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a line of JSON for each trial, the best first."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        part.write_text("".join(f"{json.dumps(row)}\n" for row in self.rank(rows)))
        part.replace(file)


def read_result(folder: Path, plan: Sweep, values: Mapping[str, Any]) -> float | None:
    """The last value of the metric in a finished run; None where there is none.

    Raises UserError when the metric is in no line, or the run was made with other settings.
    """
    if not (folder / "model.step").is_file():
        return None
    kept = folder / "sweep.json"
    if kept.is_file() and parse_json(kept.read_text()) != dict(values):
        raise UserError(f"{folder}: was trained with other settings; remove it, or name it anew")
    kept.write_text(json.dumps(dict(values)))
    found, keys = None, set[str]()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = parse_json(line)
        keys |= row.keys()
        found = row.get(plan.metric, found)
    if plan.metric not in keys:
        raise UserError(
            f"metric.name: no '{plan.metric}' in {folder / 'metrics.jsonl'}"
            f"{did_you_mean(plan.metric, sorted(keys))}"
        )
    return found


def _check(where: str, one: Any, method: str) -> None:
    if not isinstance(one, Mapping):
        raise UserError(f"{where}: needs values: [...], value:, or min: and max:")
    if "values" in one or "value" in one:
        if "values" in one and not (isinstance(one["values"], list) and one["values"]):
            raise UserError(f"{where}.values: a list of one value or more")
        return
    if "min" not in one or "max" not in one:
        raise UserError(f"{where}: needs values: [...], value:, or min: and max:")
    if method == "grid":
        raise UserError(f"{where}: a grid needs values: [...]; min and max are for random")
    low, high = one["min"], one["max"]
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low <= high):
        raise UserError(f"{where}: min and max: numbers, min first")
    kind = one.get("distribution", "uniform")
    if kind not in DISTRIBUTIONS:
        known = did_you_mean(str(kind), DISTRIBUTIONS)
        raise UserError(f"{where}.distribution: unknown '{kind}'{known}")
    if kind == "log_uniform_values" and low <= 0:
        raise UserError(f"{where}: log_uniform_values needs min above 0")


def _draw(one: Mapping[str, Any], rng: random.Random) -> Any:
    if "value" in one:
        return one["value"]
    if "values" in one:
        return rng.choice(one["values"])
    low, high, kind = one["min"], one["max"], one.get("distribution")
    if kind is None:
        kind = "int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform"
    if kind == "int_uniform":
        return rng.randint(int(low), int(high))
    if kind == "log_uniform_values":
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    value = rng.uniform(low, high)
    if kind == "q_uniform":
        quantum = one.get("q", 1)
        return round(value / quantum) * quantum
    return value
