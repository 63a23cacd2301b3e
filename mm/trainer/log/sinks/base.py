"""Sink: a place besides metrics.jsonl where a run is shown. Each is one file and a registry line.

A sink may be slow, hang, fail or be full: it runs in a thread of its own
(`mm.trainer.log.tracker`), so it is written without guards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from mm.config import Config
from mm.errors import UserError
from mm.run import Run

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Place:
    """What a sink is opened with.

    ``config``: the resolved config with its ``environment`` and ``lineage``; None: the training is
    over, and something is added to it.
    """

    run: Run
    folder: Path
    run_id: str  # the same over restarts, re-queues and world sizes
    config: Mapping[str, Any] | None = None
    artifacts: Sequence[Artifact] = ()
    goes_on: bool = True  # an earlier part of the run was there


@dataclass(frozen=True)
class Artifact:
    """A thing with a version: what went into a run, or came out of it.

    ``files`` are uploaded, ``references`` are only pointed at.
    """

    name: str
    kind: str  # data, tokenizer, tokens, model, code
    files: Sequence[Path] = ()
    references: Sequence[Path] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_input: bool = False


class SinkConfig(Config):
    """Config of a sink; ``build(place)`` opens it, in its own thread."""

    package: ClassVar[str] = ""  # what it imports, and the extra that brings it

    def check(self) -> None:
        """Refuse a sink whose package is not there. Raises UserError with the command."""
        kind = getattr(self, "kind", "")
        if self.package and find_spec(self.package) is None:
            raise UserError(
                f"tracking.sinks: '{kind}' needs the package '{self.package}': pip install "
                f"'mm-stack[{kind}]', or leave it out"
            )


class Sink:
    """What the tracker sends. A sink without a place for something leaves it out."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Show the metrics of a step: numbers; a ``<x>_confusion`` matrix with ``<x>_classes``."""
        raise NotImplementedError

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show rows: column -> a number, a word, or the `Path` of a picture, a sound or a text."""

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures of the whole run."""

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell somebody now."""

    def artifact(self, one: Artifact) -> None:
        """Show that the run used or made it."""

    def finish(self) -> None:
        """Send what is left."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values that are one number."""
    return {k: v for k, v in row.items() if isinstance(v, (bool, int, float))}
