"""Profile: a Chrome trace of some steps, and their dearest operators."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mm.errors import UserError
from mm.trainer.callbacks.base import Callback, Training

DEAREST = 10
FOLDER = "profile"  # of the run
RANGE = re.compile(r"([0-9]{1,12}):([0-9]{1,12})")

Rows = Sequence[Mapping[str, Any]]


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of ``10:13``. Raises UserError."""
    found = RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile {text}: write FIRST:LAST, steps from 1 on, such as 10:13")
    return first, last


class Profile(Callback):
    """Traces steps ``first`` to ``last`` on the main rank; nothing is hooked outside them.

    Writes ``profile/steps_FIRST_LAST.trace.json`` (chrome://tracing, Perfetto) and, as
    ``.ops.json``, the operators by their own time: of the device where it is a GPU, else of the
    CPU, in milliseconds over all these steps. A step goes from its data to its report.

    Args:
        show: told the ten dearest of them, as soon as they are known.
    """

    def __init__(self, first: int, last: int, show: Callable[[Rows, str], Any]):
        self.first, self.last, self._show = first, last, show
        self._profiler: Any = None

    def check(self, trainer: Training) -> None:
        asked = f"--profile {self.first}:{self.last}"
        if self.last > trainer.steps:
            raise UserError(f"{asked}: the run has {trainer.steps} steps; name steps up to that")
        if self.first <= trainer.step:
            raise UserError(
                f"{asked}: {trainer.step} steps of this run are done; name later ones, or another "
                "run: name=..."
            )

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        if step == self.first and name == "data" and self._profiler is None and trainer.is_main:
            self._profiler = begin(trainer.device.type == "cuda")

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if step == self.last:
            self._finish(trainer)

    def on_end(self, trainer: Training) -> None:
        self._finish(trainer)  # a run that was stopped among them

    def _finish(self, trainer: Training) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        folder = trainer.folder / FOLDER
        folder.mkdir(exist_ok=True)
        trace = folder / f"steps_{self.first}_{self.last}.trace.json"
        rows = finish(profiler, trace, trainer.device.type == "cuda")
        trace.with_name(f"steps_{self.first}_{self.last}.ops.json").write_text(
            json.dumps(rows, indent=1)
        )
        self._show(rows, str(trace))


def begin(on_gpu: bool) -> Any:
    """A profiler that records from here on: the CPU, and the GPU's kernels where there is one."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu)
    profiler.__enter__()
    return profiler


def finish(profiler: Any, trace: Path, on_gpu: bool) -> list[dict[str, Any]]:
    """End the recording and write it as a Chrome trace, packed where it is named .gz; `dearest`."""
    if on_gpu:
        torch.cuda.synchronize()
    profiler.__exit__(None, None, None)
    profiler.export_chrome_trace(str(trace))
    return dearest(profiler.key_averages(), on_gpu)


def dearest(averages: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The operators that take most time of their own, without those that they call."""
    own = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total
    total = sum(map(own, averages)) or 1
    return [
        {"op": e.key, "calls": e.count, "ms": own(e) / 1e3, "share": own(e) / total}
        for e in sorted(averages, key=own, reverse=True)[:DEAREST]
    ]
