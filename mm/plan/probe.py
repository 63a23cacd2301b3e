"""A callback that measures one step of a real run: `imports: [mm.plan.probe]`, kind `plan_probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.batch import Batch
from mm.config import Config
from mm.plan.tally import Measure
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training


@CALLBACKS.register("plan_probe")
class ProbeConfig(Config):
    """Measure live bytes and collectives of one optimizer step."""

    kind: Literal["plan_probe"] = "plan_probe"
    step: Annotated[int, Field(gt=0, description="which one; its shapes should be usual")] = 3
    file: Annotated[Path, Field(description="JSON of the first process")] = Path("measured.json")

    def build(self) -> Probe:
        return Probe(self)


class Probe(Callback):
    """See `ProbeConfig`."""

    def __init__(self, config: ProbeConfig):
        self.config = config
        self.measure: Measure | None = None

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        if trainer.step + 1 == self.config.step:
            self.measure = Measure()
            self.measure.__enter__()

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if self.measure is None:
            return
        measure, self.measure = self.measure, None
        measure.__exit__(None, None, None)
        if trainer.is_main:
            found = {
                "peak_bytes": measure.live.peak,
                "collectives": dict(measure.collectives),
                "calls": dict(measure.calls),
                "at_peak": dict(measure.live.at_peak.most_common(20)),
            }
            self.config.file.write_text(json.dumps(found, indent=1) + "\n")
