"""What a run says of itself at its end: means, held-out figures, where the time went."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.callbacks.times import Times

WINDOW, SHARE = 100, 0.1  # steps of a mean: at most, and of the whole run
COUNTS = ("tokens/seen", "items/seen", "data/epoch", "data/rejects/", "data/token_shares/")
CUMULATIVE = ("skipped", *COUNTS)  # their last value counts


class Summary(Callback):
    """Collects the summary of what this process trained; see `result`."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._rows: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._held_out: dict[str, float] = {}

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        held_out = {k: v for k, v in numbers.items() if k.startswith("val/")}
        self._held_out = held_out or self._held_out
        self._rows.append({k: v for k, v in numbers.items() if k not in held_out})

    def result(self, trainer: Training) -> dict[str, Any]:
        """The summary, JSON-able.

        ``steps``: that the means are of, the last tenth of the run, at most 100. ``means`` of every
        metric where it is finite (of what counts up, the last value), ``held_out``: the newest
        figures, ``seconds`` by phase: start, stage, data, step, held_out, report, save, export,
        evaluate.
        """
        rows = list(self._rows)[-max(1, min(WINDOW, round(SHARE * trainer.steps))) :]
        means: dict[str, float] = {}
        for name in dict.fromkeys(k for row in rows for k in row):
            values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
            if values and name.startswith(CUMULATIVE):
                means[name] = values[-1]
            elif values:
                means[name] = sum(values) / len(values)
        return {
            "steps": len(rows),
            "means": means,
            "held_out": self._held_out,
            "seconds": {k: round(v, 2) for k, v in self._times.by_phase().items()},
        }
