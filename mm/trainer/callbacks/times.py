"""Times: how long each phase of a training took, over all its parts, in ``times.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.trainer.callbacks.base import Callback, Training

FILE = "times.json"


class Times(Callback):
    """Adds up the seconds of every phase; they are all of the trainer's time.

    The file is written with each checkpoint and at the end. A resumed run goes on counting; what a
    killed one did after its last checkpoint is not in it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._begun = "start", time.monotonic()
        self._loaded = False

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        now = time.monotonic()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._begun
        self._phase, self._begun = name, now

    def on_stage_start(self, trainer: Training) -> None:
        if self._loaded or not trainer.is_main:
            return
        self._loaded = True
        if trainer.step > 0:
            for name, value in _read(trainer.folder / FILE).items():
                self.seconds[name] = self.seconds.get(name, 0.0) + value

    def on_save(self, trainer: Training, step: int) -> None:
        self._write(trainer)

    def on_end(self, trainer: Training) -> None:
        self._write(trainer)

    def _write(self, trainer: Training) -> None:
        if not trainer.is_main:
            return
        self.on_phase(trainer, self._phase, trainer.step)
        part = trainer.folder / f"{FILE}.part"
        part.write_text(json.dumps({"seconds": {k: round(v, 3) for k, v in self.seconds.items()}}))
        part.replace(trainer.folder / FILE)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())["seconds"]
        return {k: float(v) for k, v in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
