"""How much a run has read: tokens since its beginning, passes over the stage's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.trainer.callbacks.base import Callback, Training


class Seen(Callback):
    """Adds ``tokens/seen`` (or ``items/seen``) and ``data/epoch`` to the metrics.

    Tokens are places that hold one, as those of ``perf/tokens_per_second``, of all ranks and
    stages; a step that is made again counts again, as its rows were read. An epoch is a pass of the
    stage over the source that was seen least.
    """

    UNITS = ("tokens", "items")

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    def count(self, facts: Mapping[str, Any]) -> None:
        """Add a step's ``tokens/step`` and ``items/step``."""
        for unit in self.UNITS:
            if f"{unit}/step" in facts:
                self.sums[unit] = self.sums.get(unit, 0) + round(facts[f"{unit}/step"])

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        metrics |= {f"{unit}/seen": n for unit, n in self.sums.items()}
        epoch = getattr(trainer.stream, "epoch", None)
        if epoch is not None:
            metrics.setdefault("data/epoch", float(epoch))
