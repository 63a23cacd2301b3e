"""Attention with linear biases. R rows, T queries, S keys, H heads."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mm.config import Config
from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


def slopes(heads: int) -> list[float]:
    """``2 ** (-8 h / H)``, h = 1..H.

    Other H than powers of two take every second slope of the next power for the rest, as the
    authors' code does.
    """
    whole = 2 ** int(math.log2(heads))
    first = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    rest = [2.0 ** (-8.0 * (h + 1) / (2 * whole)) for h in range(0, 2 * (heads - whole), 2)]
    return first + rest


class Alibi(Position):
    """Add ``-slope_h * |distance|`` to the logits.

    Source: Press et al. 2021 (arXiv:2108.12409), section 3; ``|distance|`` is its symmetric form
    for masks that are not causal.
    """

    fades = True

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor:
        """`(R, H, T, S)` float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        slope = torch.tensor(slopes(q.shape[2]), dtype=wide, device=q.device)
        distance = (fq.position[:, :, None, 0] - fk.position[:, None, :, 0]).abs()
        return -slope[:, None, None] * distance[:, None].to(wide)

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        """`score` as the distance of two vectors."""
        # float64: a difference of long distances keeps the short one that it stands for.
        slope = torch.tensor(slopes(q.shape[2]), dtype=torch.float64, device=q.device)
        q_fade, k_fade = (slope * f.position[..., :1] for f in (fq, fk))
        return ScoreSpec(fade_RTH=q_fade, fade_RSH=k_fade)


@POSITIONS.register("alibi")
class AlibiConfig(Config):
    """Linear biases."""

    kind: Literal["alibi"] = "alibi"

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Alibi:
        return Alibi()
