"""Rotary positions and their scaling rules. B rows, T tokens, H heads, K head width."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels import device
from mm.kernels.rotary import norm_rotary, rotary
from mm.layout import Fields
from mm.model.norm import RMSNorm, ZeroCentredNorm
from mm.model.positions.base import Position
from mm.registry import POSITIONS

_PLAIN = rotary.implementations["reference"][0]


def turn(x: Tensor, cos_sin: Tensor) -> Tensor:
    """`rotary` of `(B, T, H, K)` by the angles of `(2, B, T, 1, P)`.

    On the CPU the formula itself: choosing it would cost a step of decoding half as much again.
    """
    return rotary(x, cos_sin) if x.device.type == device.KIND else _PLAIN(x, cos_sin)


def turn_normed(x: Tensor, norm: nn.Module, cos_sin: Tensor) -> Tensor:
    """`turn` of normed heads, in one pass where they share their scales."""
    if x.device.type == device.KIND and type(norm) in (RMSNorm, ZeroCentredNorm):
        assert isinstance(norm, RMSNorm)
        return norm_rotary(x, norm.scale(), cos_sin, norm.eps)
    return turn(norm(x), cos_sin)


class Rope(Position):
    """Rotate pairs (i, i + K/2) of a head by ``position * theta ** (-2i / K)``.

    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34, in the half-split order of GPT-NeoX; scaling
    rules: `frequencies`.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None = None,
        rotated: int | None = None,
    ):
        rule = f".{scaling.model_dump_json()}" if scaling is not None else ""
        self.rotated = head_dim if rotated is None else rotated
        self.key = f"rope.{theta}.{self.rotated}{rule}"
        self.theta, self.scaling = theta, scaling

    def prepare(self, f: Fields) -> Tensor:
        """`(2, B, T, 1, K/2)` float32 cosines and sines of every place (float64 angles.

        Exact far out).
        """
        half = (
            torch.arange(0, self.rotated, 2, device=f.position.device, dtype=torch.float64)
            / self.rotated
        )
        speed, length = self.theta**-half, 1.0
        if self.scaling is not None:
            speed, length = frequencies(self.scaling, self.theta, half)
            if self.scaling.rule in BOUNDED:
                refuse_beyond(f.position[:, :, 0], self.scaling.original)
        angle = f.position[:, :, :1, None].to(torch.float64) * speed
        return (length * torch.stack((angle.cos(), angle.sin()))).to(torch.float32)

    def apply(self, x: Tensor, prepared: Tensor) -> Tensor:
        return turn(x, prepared)

    def apply_normed(self, x: Tensor, norm: nn.Module, prepared: Tensor) -> Tensor:
        return turn_normed(x, norm, prepared)


# Rules that rotate the same token otherwise in a longer pass, which no cache of keys can follow:
# they hold for `original` places, and later ones are refused.
BOUNDED = ("dynamic", "longrope")


def refuse_beyond(place_BT: Tensor, most: int) -> None:
    """Refuse places from ``most`` on.

    Raises:
        ValueError: on the CPU. An accelerator is not waited for: it stops the run when it gets
            here.
    """
    message = (
        f"a place lies beyond the {most} for which these rotations are the model's own; cut the "
        "documents, or give it a scaling that is the same for all lengths, such as yarn"
    )
    outside = (place_BT >= most).any()
    if place_BT.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~outside, message)
    elif not torch.compiler.is_compiling() and bool(outside):
        raise ValueError(message)


class RopeScaling(Config):
    """How a model trained on ``original`` tokens is made to read ``factor`` times as many."""

    rule: Literal["linear", "ntk", "yarn", "llama3", "dynamic", "longrope"]
    factor: Annotated[float, Field(ge=1)]
    original: Annotated[int, Field(gt=0, description="tokens of the first training")] = 2048
    # Turns within `original` tokens: pairs with fewer than `low` are slowed by `factor`, with more
    # than `high` left alone.
    low: Annotated[float, Field(gt=0, description="yarn and llama3")] = 1.0
    high: float | None = Field(
        default=None, gt=0, description="yarn (32 there) and llama3 (4 there)"
    )
    length: float | None = Field(
        default=None,
        gt=0,
        description="yarn, longrope: of rotated vectors; default 0.1 ln(factor) + 1, 1",
    )
    short: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="longrope: what each pair is slowed by within `original` places"
    )
    long: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="longrope: beyond them; kept for `mm export`"
    )
    round: Annotated[bool, Field(description="yarn: corner indices to whole pairs")] = True


def frequencies(rule: RopeScaling, theta: float, half: Tensor) -> tuple[Tensor, float]:
    """`(K/2,)` float64 angles a place, and the length of rotated queries and keys (1 but in YaRN).

    ``half`` = ``2i / K``. Source: linear: Chen et al. 2023 (arXiv:2306.15595), eq. 4; ntk: the
    fixed "NTK-aware" base, Peng et al. 2023 (arXiv:2309.00071), definition 1; yarn: there, eq. 22
    to 25, with the corner indices rounded as in its code; llama3: Dubey et al. 2024
    (arXiv:2407.21783), as in its code; longrope: Ding et al. 2024 (arXiv:2402.13753), section 3,
    within the first length, where dynamic (of Peng et al., too) is no scaling.
    """
    speed = theta**-half
    pairs = half.shape[0]
    if rule.rule == "dynamic":
        return speed, 1.0
    if rule.rule == "longrope":
        return speed / speed.new_tensor(rule.short), rule.length or 1.0
    if rule.rule == "linear":
        return speed / rule.factor, 1.0
    if rule.rule == "ntk":
        K = 2 * pairs
        return (theta * rule.factor ** (K / max(K - 2, 1))) ** -half, 1.0
    if rule.rule == "llama3":
        turns, high = rule.original * speed / (2 * math.pi), rule.high or 4.0
        keep = ((turns - rule.low) / (high - rule.low)).clamp(0, 1)
        return keep * speed + (1 - keep) * speed / rule.factor, 1.0
    # The pair that makes `turns` turns, as a real index.
    index = lambda turns: pairs * math.log(rule.original / (turns * 2 * math.pi)) / math.log(theta)
    begin, end = index(rule.high or 32.0), index(rule.low)
    if rule.round:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, 2 * pairs - 1)
    length = rule.length or 0.1 * math.log(rule.factor) + 1.0
    at = torch.arange(pairs, device=half.device, dtype=half.dtype)
    slowed = ((at - begin) / max(end - begin, 1e-3)).clamp(0, 1)
    return (1 - slowed) * speed + slowed * speed / rule.factor, length


@POSITIONS.register("rope")
class RopeConfig(Config):
    """Rotary positions on axis 0 (time)."""

    kind: Literal["rope"] = "rope"
    theta: Annotated[float, Field(gt=1, le=1e12)] = 10000.0
    scaling: RopeScaling | None = None
    fraction: float = Field(
        default=1.0, gt=0, le=1, description="of a head's width that is rotated, its first part"
    )

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Rope:
        rotated = int(head_dim * self.fraction)
        if rotated % 2 or not rotated:
            raise ValueError(f"rope rotates pairs: {rotated} of head_dim {head_dim}")
        rule: Any = self.scaling
        if rule is not None and rule.high is not None and rule.high <= rule.low:
            raise ValueError(f"rope scaling: high {rule.high} must exceed low {rule.low}")
        if rule is not None and rule.rule == "longrope":
            if any(len(given or ()) != rotated // 2 for given in (rule.short, rule.long)):
                raise ValueError(f"rope scaling: short and long need {rotated // 2} factors each")
        return Rope(head_dim, self.theta, rule, rotated)
