"""How much a run has read: tokens since its beginning, passes over its data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mm.trainer.callbacks.base import Callback, Training


class Seen(Callback):
    """Adds ``tokens/seen`` (or ``items/seen``) and ``data/epoch`` to the metrics.

    Tokens are places that hold one, as those of ``perf/tokens_per_second``, of all ranks and
    stages; a step that is made again counts again, as its rows were read. An epoch is a pass over
    the source that was seen least: it goes on where the stage before read the same sources, and
    begins anew with others.
    """

    UNITS = ("tokens", "items")
    KEPT = ("sums", "stage", "sources", "before", "last")

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.stage = -1
        self.sources: list[str] = []  # of that stage
        self.before = 0.0  # passes over them before it
        self.last = 0.0  # passes over them so far

    def count(self, facts: Mapping[str, Any]) -> None:
        """Add a step's ``tokens/step`` and ``items/step``."""
        for unit in self.UNITS:
            if f"{unit}/step" in facts:
                self.sums[unit] = self.sums.get(unit, 0) + round(facts[f"{unit}/step"])

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        metrics |= {f"{unit}/seen": n for unit, n in self.sums.items()}
        epoch = getattr(trainer.stream, "epoch", None)
        if epoch is None:
            return
        if trainer.stage.index != self.stage:
            sources = _sources(trainer.stage.config.data)
            self.before = self.last if sources == self.sources else 0.0
            self.stage, self.sources = trainer.stage.index, sources
        self.last = self.before + float(epoch)
        metrics.setdefault("data/epoch", self.last)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.KEPT:
            if name in state:
                setattr(self, name, copy.copy(state[name]))


def _sources(data: Any) -> list[str]:
    """What a stage reads: folders with their splits."""
    several = getattr(data, "sources", None) or [getattr(data, "source", data)]
    named = (f"{getattr(s, 'path', s)} {getattr(s, 'split', '')}" for s in several)
    return sorted(named)
