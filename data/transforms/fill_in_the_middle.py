"""Fill in the middle: a text's end is told before its middle, so that a causal model can insert.

L codes of a segment.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.transforms.chunk import window
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


@TRANSFORMS.register("fill_in_the_middle")
class FillInTheMiddleConfig(Config):
    """Move the middle of a share of the samples to their end; others stay as they are."""

    kind: Literal["fill_in_the_middle"] = "fill_in_the_middle"
    modality: Annotated[str, Field(description="of samples that are one segment of it")] = "text"
    rate: Annotated[float, Field(ge=0, le=1, description="share of the samples")] = 0.5
    suffix_first: Annotated[
        float, Field(ge=0, le=1, description="share of those whose end comes before their start")
    ] = 0.5

    def build(self) -> FillInTheMiddle:
        return FillInTheMiddle(self.modality, self.rate, self.suffix_first)


class FillInTheMiddle(Transform):
    """See `FillInTheMiddleConfig`: segments of start, end, middle, or end, start, middle.

    Both borders are uniform over the codes. Every piece costs loss, but for the `end` of those that
    were cut; that of the middle says where it joins what follows. To insert: two conditions and a
    target.

    Source: Bavarian et al. 2022 (arXiv:2207.14255), sections 3 and 4.1, PSM and SPM.
    """

    by_length = True

    def __init__(self, modality: str, rate: float, suffix_first: float):
        self.modality, self.rate, self.suffix_first = modality, rate, suffix_first

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        moves, swaps = rng.random(2) < (self.rate, self.suffix_first)
        if not moves or len(segments) != 1:
            return segments
        (s,) = segments
        if s.modality != self.modality or s.ids is None or s.role != "target" or len(s.ids) < 3:
            return segments
        a, b = np.sort(rng.choice(len(s.ids) - 1, 2, replace=False)) + 1
        start, end = window(s, 0, a), window(s, b, len(s.ids))
        middle = s._replace(ids=s.ids[a:b], targets=None if s.targets is None else s.targets[a:b])
        return [end, start, middle] if swaps else [start, end, middle]
