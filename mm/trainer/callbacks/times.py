"""Times: how long each phase of a training took, over all its parts, in ``times.json``."""

from __future__ import annotations

import contextlib
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
        self._now: dict[str, float] = {}
        self._before: dict[str, float] | None = None  # of the parts that this one goes on from
        self._phase, self._begun = "start", time.monotonic()

    def by_phase(self) -> dict[str, float]:
        """Seconds by phase in this process, up to now."""
        self._count(self._phase)
        return dict(self._now)

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        self._count(name)

    def on_stage_start(self, trainer: Training) -> None:
        if self._before is None:
            self._before = _read(trainer.folder / FILE) if trainer.step > 0 else {}

    def on_save(self, trainer: Training, step: int) -> None:
        self._write(trainer)

    def on_end(self, trainer: Training) -> None:
        self._write(trainer)

    def _count(self, phase: str) -> None:
        """Add what the phase has lasted, and go on in ``phase``."""
        now = time.monotonic()
        self._now[self._phase] = self._now.get(self._phase, 0.0) + now - self._begun
        self._phase, self._begun = phase, now

    def _write(self, trainer: Training) -> None:
        if not trainer.is_main:
            return
        seconds = self.by_phase()
        for name, value in (self._before or {}).items():
            seconds[name] = seconds.get(name, 0.0) + value
        part = trainer.folder / f"{FILE}.part"
        text = json.dumps({"seconds": {k: round(v, 3) for k, v in seconds.items()}})
        with contextlib.suppress(OSError):  # a full disk: the save says so, times are no reason
            part.write_text(text)
            part.replace(trainer.folder / FILE)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())["seconds"]
        return {k: float(v) for k, v in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
