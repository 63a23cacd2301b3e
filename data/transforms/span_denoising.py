"""Span denoising: a text with holes is a condition, what filled them is the target.

L codes of a segment.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


class Denoiser(Config):
    """One way to make holes; `mean: 0` keeps a beginning and asks for the rest."""

    rate: Annotated[float, Field(gt=0, lt=1, description="share of the codes in holes")] = 0.15
    mean: Annotated[float, Field(ge=0, description="mean codes of a hole; 0: one, at the end")] = (
        3.0
    )
    weight: Annotated[float, Field(ge=0, description="how often it is drawn")] = 1.0


@TRANSFORMS.register("span_denoising")
class SpanDenoisingConfig(Config):
    """Cut holes into samples that are one segment of ``modality``; others stay as they are.

    The pieces around the holes become conditions, then what was in the holes targets, in order.
    """

    kind: Literal["span_denoising"] = "span_denoising"
    modality: Annotated[str, Field(description="modality whose segments get holes")] = "text"
    denoisers: Annotated[
        tuple[Denoiser, ...], Field(min_length=1, description="one is drawn for each sample")
    ] = (Denoiser(),)

    @field_validator("denoisers")
    @classmethod
    def _some_weight(cls, found: tuple[Denoiser, ...]) -> tuple[Denoiser, ...]:
        if not any(d.weight for d in found):
            raise ValueError("no denoiser has a weight above 0")
        return found

    def build(self) -> SpanDenoising:
        return SpanDenoising(self.modality, self.denoisers)


class SpanDenoising(Transform):
    """See `SpanDenoisingConfig`.

    A hole is where a condition ends and the next begins, so no sentinel ids are needed: the i-th
    target fills the i-th hole, and its `end` closes it.

    Source: Raffel et al. 2019, T5 (arXiv:1910.10683), section 3.1.4: random lengths of a given
    sum; mixtures: Tay et al. 2022, UL2 (arXiv:2205.05131), section 3.1.2, where `mean: 0` is its
    S-denoiser; 20 bytes a hole: Xue et al. 2021, ByT5 (arXiv:2105.13626), section 3.1.
    """

    by_length = True

    def __init__(self, modality: str, denoisers: tuple[Denoiser, ...]):
        self.modality, self.denoisers = modality, denoisers
        weights = np.array([d.weight for d in denoisers])
        self._borders = np.cumsum(weights / weights.sum())

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        drawn = int(np.searchsorted(self._borders, rng.random(), side="right"))
        chosen = self.denoisers[min(drawn, len(self.denoisers) - 1)]
        (s, *others) = segments or [None]
        if s is None or others or s.modality != self.modality or s.ids is None or len(s.ids) < 2:
            return segments
        kept, holes = cut(len(s.ids), chosen, rng)
        piece = lambda a, b: s._replace(ids=s.ids[a:b], targets=None, grid=())
        return [
            *(piece(a, b)._replace(role="condition") for a, b in kept),
            *(piece(a, b)._replace(role="target") for a, b in holes),
        ]


def cut(L: int, how: Denoiser, rng: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Begins and ends of what is kept and of the holes, of which there is one fewer or as many."""
    lost = min(L - 1, max(1, round(L * how.rate)))
    if how.mean == 0:
        return [(0, L - lost)], [(L - lost, L)]
    n = max(1, min(round(lost / how.mean), L - lost, lost))
    spans, rest = _parts(lost, n, rng), _parts(L - lost, n, rng)
    ends = np.cumsum(np.stack([rest, spans], 1).reshape(-1)).tolist()
    begins = [0, *ends[:-1]]
    pairs = list(zip(begins, ends, strict=True))
    return pairs[::2], pairs[1::2]


def _parts(total: int, n: int, rng: Any) -> np.ndarray:
    """``n`` positive numbers whose sum is ``total``, all such equally likely."""
    borders = np.sort(rng.choice(total - 1, n - 1, replace=False)) + 1 if n > 1 else []
    return np.diff(np.concatenate([[0], borders, [total]])).astype(int)
