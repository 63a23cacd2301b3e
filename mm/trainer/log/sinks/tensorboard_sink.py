"""TensorBoard as a sink: events in ``<run folder>/tensorboard``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mm.data.modalities.base import show_file
from mm.registry import SINKS
from mm.trainer.log.sinks.base import Level, Place, Sink, SinkConfig, numbers


@SINKS.register("tensorboard")
class TensorboardConfig(SinkConfig):
    """TensorBoard; needs the extra `tensorboard`. Open it with: tensorboard --logdir runs."""

    package = "tensorboard"

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, place: Place) -> TensorboardSink:
        return TensorboardSink(place)


class TensorboardSink(Sink):
    """Scalars by step; a table's pictures, sounds and words by its name and their row."""

    def __init__(self, place: Place):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(place.folder / "tensorboard"))
        if place.config is not None:
            text = json.dumps(place.config, indent=1, default=str)
            self._writer.add_text("config", f"<pre>{text}</pre>", 0)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for i, row in enumerate(rows):
            for column, value in row.items():
                self._show(f"{name}/{i:02d} {column}", value, step)
        self._writer.flush()

    def summary(self, figures: Mapping[str, Any]) -> None:
        for name, value in numbers(figures).items():
            self._writer.add_scalar(f"summary/{name}", value, 0)

    def alert(self, title: str, text: str, level: Level) -> None:
        self._writer.add_text("alerts", f"**{level}** {title}: {text}")

    def finish(self) -> None:
        self._writer.close()

    def _show(self, tag: str, value: Any, step: int) -> None:
        if not isinstance(value, Path):
            if isinstance(value, str):
                self._writer.add_text(tag, value, step)
            return
        shown = show_file(value)
        if shown.kind == "image":
            from numpy import asarray
            from PIL import Image

            with Image.open(io.BytesIO(shown.content)) as image:
                pixels = asarray(image.convert("RGB"))
            self._writer.add_image(tag, pixels, step, dataformats="HWC")
        elif shown.kind == "audio":
            import soundfile

            wave, rate = soundfile.read(value, dtype="float32", always_2d=True)
            self._writer.add_audio(tag, wave.mean(1)[None], step, sample_rate=rate)
        else:
            self._writer.add_text(tag, shown.content[:2000], step)
