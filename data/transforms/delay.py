"""Delay: all codebooks of a frame in one place, or each some places after the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.batching.codebooks import lay_out
from mm.errors import UserError
from mm.registry import TRANSFORMS
from mm.specs import Delays, Segment, Transform


@TRANSFORMS.register("delay")
class DelayConfig(Config):
    """Lay the codebooks of a modality out in one place, codebook q ``delays[q]`` places later.

    It comes last, but before a `chunk`, which then cuts places. 0, 1, 2, ..: each codebook is told
    by those of its frame before it. All 0: a frame in one place, for the head `depth`. The model's
    head `codes` says the same delays.
    """

    kind: Literal["delay"] = "delay"
    delays: Annotated[
        Delays, Field(description="modality -> places that each codebook waits", min_length=1)
    ]

    @classmethod
    def smallest(cls) -> DelayConfig:
        return cls(delays={"audio": (0, 1, 2)})

    def build(self) -> Delay:
        return Delay(self.delays)


class Delay(Transform):
    """See `DelayConfig`.

    Source: Copet et al. 2023 (arXiv:2306.05284), section 2.1, delay pattern; Défossez et al. 2024
    (arXiv:2410.00037), section 3.4.2, acoustic delay.
    """

    by_length = True

    def __init__(self, delays: Mapping[str, tuple[int, ...]]):
        self.makes_codebooks = dict(delays)

    def __call__(self, segments: list[Segment], rng: Any = None) -> list[Segment]:
        return [self._laid(s) if s.modality in self.makes_codebooks else s for s in segments]

    def _laid(self, s: Segment) -> Segment:
        if s.ids is None or s.role == "label":
            return s
        each = [name for name, v in s.fields.items() if getattr(v, "ndim", 0)]
        if s.position is not None or each or s.ids.ndim != 1:
            raise UserError(
                f"transform delay: '{s.modality}' was masked or placed code by code before: "
                "several codebooks in one place go with neither"
            )
        delays, targets = self.makes_codebooks[s.modality], s.targets
        try:
            if targets is not None:
                own = lay_out(np.asarray(targets)[: len(s.ids)], delays)
                more = len(targets) - len(s.ids)  # the mark of a cut
                targets = np.pad(own, ((0, more), (0, 0)), constant_values=-1)
            return s._replace(ids=lay_out(s.ids, delays), targets=targets)
        except ValueError as error:
            raise UserError(f"transform delay: '{s.modality}': {error}") from error
