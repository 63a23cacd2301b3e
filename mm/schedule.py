"""How long a stage lasts, how its rate goes, what average of the weights it keeps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from mm.config import Config


class Budget(Config):
    """How long a stage lasts."""

    steps: Annotated[int, Field(gt=0, le=10**9, description="optimizer steps")] = 1000


class Schedule(Config):
    """Learning-rate multiplier as a pure function of the step."""

    shape: Annotated[
        Literal["constant", "cosine", "linear", "wsd"],
        Field(description="how the rate falls; wsd: constant, then a linear fall"),
    ] = "wsd"
    warmup: Annotated[int, Field(ge=0, description="steps of linear warm-up from 0")] = 50
    decay: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="wsd: last share of the run over which the rate falls to `floor`",
        ),
    ] = 0.5
    floor: Annotated[
        float, Field(ge=0, le=1, description="share of the rate that is left at the end")
    ] = 0.0

    def __call__(self, step: int, steps: int) -> float:
        """Multiplier of update number ``step`` (from 0) of ``steps``."""

        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.shape == "constant":
            return up
        if self.shape == "wsd":
            tail = max(1, round(self.decay * steps))
            share = min(1.0, max(0.0, (steps - step) / tail))
        else:
            t = min(1.0, max(0.0, (step - self.warmup) / max(1, steps - self.warmup)))
            share = 0.5 * (1 + math.cos(math.pi * t)) if self.shape == "cosine" else 1 - t
        return up * (self.floor + (1 - self.floor) * share)


class Ema(Config):
    """Exponential moving average of every network's parameters, cut as ZeRO cuts them."""

    decay: Annotated[
        float, Field(gt=0, lt=1, description="share of the old average kept at each step")
    ] = 0.999
    export: Annotated[
        bool, Field(description="it is what the stage leaves: saved model, next stage")
    ] = True

    def keep(self, updates: int) -> float:
        """Share of the old average after ``updates`` updates: rises to ``decay`` from 0.1."""
        return min(self.decay, (1 + updates) / (10 + updates))
