"""Progress: a rich bar on a terminal, else a line every ten seconds and one at the end."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training


@CALLBACKS.register("progress")
class ProgressConfig(Config):
    """Always on; name it in a run only to change it."""

    kind: Literal["progress"] = "progress"
    every_s: Annotated[
        float, Field(gt=0, description="seconds between lines without a terminal")
    ] = 10.0

    @classmethod
    def smallest(cls) -> ProgressConfig:
        return cls(every_s=60)

    def build(self) -> Progress:
        return Progress(self)


class Progress(Callback):
    """Shows step, loss, speed and ETA on standard error."""

    def __init__(self, config: ProgressConfig):
        self.config = config
        self._console: Any = None
        self._bar: Any = None
        self._metrics: dict[str, Any] = {}

    def on_stage_start(self, trainer: Training) -> None:
        if not trainer.is_main or self._console is not None:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False)
        self._begun = self._told = time.monotonic()
        self._first = trainer.step
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[tail]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(
                trainer.run.name, total=trainer.steps, completed=trainer.step, tail=""
            )
            self._bar.start()

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if not trainer.is_main:
            return
        held_out = {"val/loss": self._metrics["val/loss"]} if "val/loss" in self._metrics else {}
        self._metrics = held_out | metrics  # the newest held-out loss stays until the next one
        now = time.monotonic()
        if self._bar is not None:
            tail = _tail(self._metrics)
            self._bar.update(self._task, completed=step, total=trainer.steps, tail=tail)
        elif now - self._told >= self.config.every_s:
            self._told = now
            pace = (now - self._begun) / max(1, step - self._first)
            left = _clock(pace * (trainer.steps - step))
            self._say(
                f"{trainer.run.name} {step}/{trainer.steps} {_tail(self._metrics)} ETA {left}"
            )

    def on_end(self, trainer: Training) -> None:
        if not trainer.is_main:
            return
        if self._bar is not None:
            self._bar.stop()
        seconds = _clock(time.monotonic() - self._begun)
        self._say(
            f"{trainer.run.name} {trainer.step}/{trainer.steps} {_tail(self._metrics)} in {seconds}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def _tail(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss/total']:.4f}"] if "loss/total" in metrics else []
    if "val/loss" in metrics:
        parts.append(f"held-out {metrics['val/loss']:.4f}")
    for unit in ("tokens", "items"):
        if f"perf/{unit}_per_second" in metrics:
            parts.append(f"{metrics[f'perf/{unit}_per_second']:,.0f} {unit}/s")
    if "tokens/seen" in metrics:
        parts.append(f"{_short(metrics['tokens/seen'])} tokens seen")
    if "data/epoch" in metrics:
        parts.append(f"epoch {metrics['data/epoch']:.2f}")
    return " ".join(parts)


def _short(n: int) -> str:
    """A count in four characters or so: 812, 4.1k, 38.2M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
