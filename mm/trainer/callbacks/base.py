"""Callback: what happens around the loop. The loop itself knows none by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from mm.batch import Batch
from mm.run import Run
from mm.vocabulary import Vocabulary


class MediaSink(Protocol):
    """Where samples are shown."""

    @property
    def id(self) -> str | None: ...

    def alert(self, title: str, text: str, level: Literal["info", "warn", "error"]) -> None:
        """Tell somebody now."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show rows: column -> a number, a word, or the `Path` of a picture, a sound or a text."""
        ...


class Training(Protocol):
    """What callbacks may use of the trainer."""

    @property
    def run(self) -> Run: ...
    @property
    def folder(self) -> Path: ...
    @property
    def vocabulary(self) -> Vocabulary | None: ...
    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """Tokenizers by modality, loaded on first use."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def step(self) -> int:
        """Optimizer steps done, over all stages."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def stage_end(self) -> int:
        """Optimizer steps of the run when the stage that trains ends."""
        ...

    @property
    def batches(self) -> Sequence[Batch]:
        """Host micro-batches of the last step."""
        ...

    @property
    def stream(self) -> Any:
        """The data of the stage."""
        ...

    @property
    def stage(self) -> Any:
        """The `StageState` that trains: its config, objective, engines."""
        ...

    @property
    def guard(self) -> Any:
        """The `Guard` of the run."""
        ...

    @property
    def held_out(self) -> Any:
        """The `HeldOut` of the run."""
        ...

    @property
    def tracker(self) -> MediaSink: ...
    def phase(self, name: str, step: int, keys: Sequence[str] = ()) -> None:
        """Say to all callbacks that something that may last begins, or goes on."""
        ...

    def unsharded(self, name: str = "model") -> AbstractContextManager[nn.Module]:
        """A network in eval mode with all its weights; enter and leave it on ALL ranks."""
        ...


class Callback:
    """Plug point; every hook is optional.

    Hooks run on ALL ranks, in step: ask ``trainer.is_main`` before writing. Phases in their order:
    start, stage, (data, step, report, held_out or evaluate where they are due, save)*, export,
    evaluate.
    """

    # What its `post_step` adds to the metrics is in metrics.jsonl: it runs before they are written.
    adds_metrics: ClassVar[bool] = False

    def check(self, trainer: Training) -> None:
        """Before anything is built or written, main rank alone: raise UserError for bad settings.

        What only fails later would cost hours.
        """

    def on_stage_start(self, trainer: Training) -> None:
        """Networks and data of a stage are ready; again after a return to a checkpoint."""

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        """A phase of optimizer step ``step`` (from 1) begins; ``keys``: samples of its batch."""

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        """Before an optimizer step; micro-batches on the host may be replaced in the list."""

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        """After optimizer step ``step`` (from 1); ``metrics`` on the host may be added to."""

    def on_save(self, trainer: Training, step: int) -> None:
        """The checkpoint of ``step`` is written, or handed to the background."""

    def on_file(self, path: Path) -> None:
        """A file of a checkpoint is written by this rank, then its folder renamed by the main one.

        In any thread.
        """

    def on_end(self, trainer: Training) -> None:
        """After the last step, also when the run was stopped or failed."""
