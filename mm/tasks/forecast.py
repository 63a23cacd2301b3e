"""Forecast: how far the continuation of held-out series is off, beside a seasonal-naive one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.data.modalities.base import raw_modality
from mm.decoders.forecast import HORIZON, continue_series
from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.registry import TASKS
from mm.tasks.base import Figures, Task, open_split, spread
from mm.tasks.check import require_modalities, require_raw
from mm.vocabulary import Vocabulary


@TASKS.register("forecast")
class Forecast(Task):
    """Mean absolute error of the last ``horizon`` points, told from those before them.

    Beside it that of the seasonal-naive forecast, which repeats the last ``period`` points, and the
    quotient of both (below 1: better). Source of the quotient: Hyndman and Koehler 2006 (relative
    MAE), section 3.3.
    """

    kind: Literal["forecast"] = "forecast"
    data: Annotated[Path, Field(description="packed raw series")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    modality: Annotated[str, Field(description="of the model")] = "time_series"
    horizon: Annotated[int, Field(gt=0, description="points that are told")] = HORIZON
    period: Annotated[int, Field(gt=0, description="points of a season")] = 12
    samples: Annotated[
        int, Field(ge=0, description="drawn continuations whose median is told; 0 = their mean")
    ] = 0
    limit: Annotated[
        int | None, Field(gt=0, description="series at most, evenly spread; default all")
    ] = None

    @property
    def about(self) -> str:
        return self.modality

    @classmethod
    def smallest(cls) -> Forecast:
        return cls(data=Path("my_run/data"))

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        require_modalities((self.modality,), vocabulary, tokenizers)
        require_raw(self.data, self.split, self.modality)

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Errors of the model and of the seasonal-naive forecast. See `Task.evaluate`."""
        shards = open_split(self.data, self.split, generator.tokenizers)
        raw = raw_modality(self.modality).kind
        having = shards.having(raw)
        chosen = [int(having[k]) for k in spread(len(having), self.limit)]
        series = [np.asarray(shards.value(i, raw), np.float64) for i in chosen]
        least = self.horizon + self.period
        for i, x in zip(chosen, series, strict=True):
            if len(x) < least:
                raise UserError(
                    f"{self.data}: series '{shards.key(i)}' has {len(x)} points; a forecast of "
                    f"{self.horizon} beside a season of {self.period} needs {least}"
                )
        told = self._told(generator, [x[: -self.horizon] for x in series], seed)
        naive = [self._naive(x) for x in series]
        truth = [x[-self.horizon :] for x in series]
        off = lambda guesses: float(
            np.mean([np.abs(a - b).mean() for a, b in zip(guesses, truth, strict=True)])
        )
        figures = {"mae": off(told), "seasonal_naive_mae": off(naive)}
        figures["mae_ratio"] = figures["mae"] / max(figures["seasonal_naive_mae"], 1e-12)
        figures["n"] = len(series)
        return {f"{self.about}_{name}": value for name, value in figures.items()}

    def _naive(self, x: np.ndarray) -> np.ndarray:
        season = x[: -self.horizon][-self.period :]
        return season[np.arange(self.horizon) % self.period]

    def _told(self, generator: Generator, given: list[np.ndarray], seed: int) -> list[np.ndarray]:
        draws = [
            continue_series(
                generator.model,
                generator.vocabulary,
                generator.tokenizer(self.modality),
                given,
                self.horizon,
                temperature=1.0 if self.samples else 0.0,
                seed=seed + number,
            )
            for number in range(max(1, self.samples))
        ]
        return [np.median(np.stack(each), 0) for each in zip(*draws, strict=True)]
