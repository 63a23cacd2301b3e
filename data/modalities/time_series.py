"""Time series: float32 tables of points in time and channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mm.data.modalities.base import BadSample, Modality
from mm.registry import MODALITIES

SHOWN = 6  # points of a description


@MODALITIES.register("time_series")
class TimeSeriesModality(Modality):
    """float32 (L, C). A file has a line a point, with white space or commas between the channels.

    A first line without a number is names of columns. Length: points.
    """

    kind: Literal["time_series"] = "time_series"
    max_points: Annotated[int, Field(gt=0, description="a longer file is no sample")] = 10_000_000
    max_channels: Annotated[int, Field(gt=0, description="numbers of a line, at most")] = 4096

    order: ClassVar[int] = 25
    extensions: ClassVar[tuple[str, ...]] = ("series",)
    value_name: ClassVar[str] = "a float array (points, channels)"
    unit: ClassVar[str] = "points"
    tokens: ClassVar[Mapping[str, int]] = {"time_series": 6}

    def decode(self, data: bytes) -> np.ndarray:
        if data.count(b"\n") > self.max_points:
            raise BadSample(f"time_series: more than the cap of {self.max_points} points")
        rows: list[list[float]] = []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                row = [float(word) for word in line.replace(b",", b" ").split()]
            except ValueError as error:
                if number == 1 and not any(map(_is_number, line.replace(b",", b" ").split())):
                    continue
                raise BadSample(f"time_series: line {number} is not numbers") from error
            if not row and not line.strip():
                continue
            if rows and len(row) != len(rows[0]):
                raise BadSample(
                    f"time_series: line {number} has {len(row)} channels, the first {len(rows[0])}"
                )
            rows.append(row)
        if not rows or len(rows[0]) > self.max_channels:
            raise BadSample(f"time_series: no points, or more than {self.max_channels} channels")
        with np.errstate(over="ignore"):
            values = np.array(rows, np.float64).astype(np.float32)
        if not np.isfinite(values).all():
            number = int(np.flatnonzero(~np.isfinite(values).all(1))[0]) + 1
            raise BadSample(f"time_series: point {number} is not finite")
        return values

    def length(self, data: bytes) -> int:
        return len(self.decode(data))

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim == 2

    def accept(self, value: Any) -> np.ndarray:
        """float32 (L, C), also of (L,) and of any other numbers."""
        try:
            values = np.asarray(value, np.float32)
        except (TypeError, ValueError) as error:
            raise BadSample(f"{self.kind}: expected numbers (points, channels)") from error
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or not values.size or not np.isfinite(values).all():
            raise BadSample(f"{self.kind}: expected finite numbers (points, channels)")
        return values

    def describe(self, value: np.ndarray) -> str:
        few = " ".join(f"{x:.4g}" for x in value[:SHOWN, 0])
        more = " ..." if len(value) > SHOWN else ""
        return f"{len(value)} points of {value.shape[1]} channels: {few}{more}"

    def save(self, value: np.ndarray, path: Path) -> None:
        lines = (" ".join(f"{x:.9g}" for x in row) for row in value)
        path.write_text("".join(f"{line}\n" for line in lines))


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
