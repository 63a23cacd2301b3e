"""Time series as patches of points: values in place of ids, for an adapter to read.

L points, C channels, R patches of P points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, TokenSpec
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of
from mm.tokenizers.patches import scale_of


class SeriesPatches(ConfigTokenizer):
    """float32 series (L, C) to float32 values (R, P * C), and back.

    Every series is normalised by mean and spread of its own first ``norm_points``: what a forecast
    is made from, so that nothing of what comes later is told. Sources: patches of points: Nie et
    al. 2022 (arXiv:2211.14730), section 3.1; normalising by the first patch: Das et al. 2023
    (arXiv:2310.10688), section 4.
    """

    def __init__(self, config: SeriesPatchesConfig):
        self.config = config
        self.spec = TokenSpec(
            config.modality,
            0,
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=config.patch * config.channels,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Patches of each series; one whose length is no multiple of P is continued to the left.

        Raises:
            UserError: something is no finite series of the channels.
        """
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Any) -> Encoded:
        c = self.config
        try:
            x = np.asarray(raw, np.float64)
        except (TypeError, ValueError):
            x = np.full((1, c.channels), np.nan)
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2 or x.shape[1] != c.channels or not len(x) or not np.isfinite(x).all():
            raise UserError(
                f"series patches: expected finite numbers (points, {c.channels}), got "
                f"{np.shape(raw)}: set tokenizer.channels to what the data have"
            )
        first = x[: c.norm_points]
        loc = first.mean(0) if len(first) else np.zeros(c.channels)
        scale = scale_of(loc, first.std(0)) if len(first) else np.ones(c.channels)
        front = -len(x) % c.patch
        padded = np.concatenate((np.repeat(x[:1], front, 0), x))
        values = ((padded - loc) / scale).reshape(-1, self.spec.n_features)
        side = {"loc": loc.tolist(), "scale": scale.tolist(), "points": len(x)}
        return Encoded(values=values.astype(np.float32), side=side)

    def decode(self, codes: Sequence[Encoded]) -> list[np.ndarray]:
        """Series (L, C) float32; without side information as they were normalised."""
        return [self._decode(code) for code in codes]

    def _decode(self, code: Encoded) -> np.ndarray:
        c = self.config
        given = np.zeros((0, self.spec.n_features)) if code.values is None else code.values
        x = np.asarray(given, np.float64).reshape(-1, c.channels)
        x = x * np.array(code.side.get("scale", 1.0)) + np.array(code.side.get("loc", 0.0))
        points = code.side.get("points")
        return x[len(x) - points if points else 0 :].astype(np.float32)


@TOKENIZERS.register("series_patches")
class SeriesPatchesConfig(Config):
    """Patches of ``patch`` points of ``channels`` channels."""

    kind: Literal["series_patches"] = "series_patches"
    modality: str = "time_series"
    patch: Annotated[int, Field(gt=0, le=65536, description="points of a place")] = 12
    channels: Annotated[int, Field(gt=0, le=4096, description="numbers of a point")] = 1
    norm_points: Annotated[
        int,
        Field(
            ge=0,
            description="first points whose mean and spread normalise the series; 0: it stays as "
            "it is, for features that another model made",
        ),
    ] = 12

    def fit(self, recordings: Iterable[Any] = ()) -> SeriesPatches:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> SeriesPatches:
        """Make it; its folder holds nothing but this config."""
        return SeriesPatches(self)

    @classmethod
    def smallest_tokenizer(cls) -> SeriesPatches:
        """An instance for the laws."""
        return cls(patch=4, channels=2, norm_points=4).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws: a season, one point, a flat one, a large one."""
        rng = np.random.default_rng(0)
        t = np.arange(50)[:, None]
        made = [np.sin(t / 4) + rng.normal(0, 0.1, (50, 2)), rng.normal(0, 1, (1, 2))]
        made += [np.full((9, 2), 3.0), 1e6 + 1e3 * rng.normal(0, 1, (17, 2))]
        return [each.astype(np.float32) for each in made]
