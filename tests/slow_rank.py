"""A callback of which one rank sleeps; `imports: [slow_rank]` registers it."""

from __future__ import annotations

import time
from typing import Any, Literal

from mm.batch import Batch
from mm.config import Config
from mm.launch import environment
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback


@CALLBACKS.register("toy_slow")
class ToySlowConfig(Config):
    """One rank sleeps before some steps."""

    kind: Literal["toy_slow"] = "toy_slow"
    rank: int = 0
    seconds: float = 0.05
    first: int = 0  # steps done before which it does not sleep

    def build(self) -> ToySlow:
        return ToySlow(self)


class ToySlow(Callback):
    def __init__(self, config: ToySlowConfig):
        self.config = config

    def pre_step(self, trainer: Any, batches: list[Batch]) -> None:
        c = self.config
        if trainer.step >= c.first and environment.ranks().rank == c.rank:
            time.sleep(c.seconds)
