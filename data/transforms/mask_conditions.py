"""Mask conditions: hide some codes of what is given, to be told from all of the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


@TRANSFORMS.register("mask_conditions")
class MaskConditionsConfig(Config):
    """Hide a share of the codes of every condition; the places of hidden codes predict them.

    It comes after the transform that says what is a condition: put `any_to_any` into the stage's
    ``data.transform`` and this into its ``objective.transform``. For `mask: prefix`.
    """

    kind: Literal["mask_conditions"] = "mask_conditions"
    rate: Annotated[float, Field(gt=0, lt=1, description="share of the codes that are hidden")] = (
        0.15
    )

    @classmethod
    def smallest(cls) -> MaskConditionsConfig:
        return cls(rate=0.15)

    def build(self) -> MaskConditions:
        return MaskConditions(self.rate)


class MaskConditions(Transform):
    """See `MaskConditionsConfig`.

    Source: Arora et al. 2024 (arXiv:2407.05483), JRT-RNN: masked language modelling on the prefix,
    0.15 of its tokens, each replaced by the mask id; Devlin et al. 2018 (arXiv:1810.04805).
    """

    by_length = True

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [
            s._replace(fields={**s.fields, "masked": rng.random(len(s.ids)) < self.rate})
            if s.role == "condition" and s.ids is not None and s.values is None
            else s
            for s in segments
        ]
