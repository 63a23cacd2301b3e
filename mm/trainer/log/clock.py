"""StepClock: how long the parts of an optimizer step take, on the CPU or on the GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

PARTS = ("forward", "backward", "optimizer", "communication")


class StepClock:
    """Marks in one step. The time before a mark, since the one before it, is of the mark's part.

    On a GPU the marks are events in its stream, which are read a step later, when they have passed:
    nothing waits for them. ``communication`` is what the trainer itself sends (counts, losses,
    gradients at ZeRO stage 0); from stage 1 on gradients travel inside ``backward``.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a step."""
        self._before, self._marks = self._marks, []
        self.mark("")

    def mark(self, part: str) -> None:
        """End a ``part`` of the step here."""
        if not self._on_gpu:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Seconds by part of the step that ended; on a GPU of the one before it, {} at first."""
        marks = self._before if self._on_gpu else self._marks
        if self._on_gpu and marks and not marks[-1][1].query():
            return {}
        out: dict[str, float] = {part: 0.0 for part in PARTS} if len(marks) > 1 else {}
        for (_, begun), (part, ended) in zip(marks, marks[1:], strict=False):
            took = begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun
            out[part] += took
        return out
