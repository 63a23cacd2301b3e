"""A causal mixer that reads the cells of a grid in another order. B rows, T tokens, D model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal
from mm.model.layer import Caps, Ctx, Linear, Mixer, Out
from mm.model.linears.dense import DenseConfig
from mm.model.mirror import elsewhere, gathered, refuse_state
from mm.model.scan_state import begins
from mm.registry import MIXERS
from mm.state import State


def ordered(layout: Layout, axes: tuple[int, ...], reverse: bool) -> Tensor:
    """Flat places `(B * T,)` with every document's sorted by its positions on ``axes``, the most
    important first; places that are equal there keep their order. Padding stays where it is.
    """
    position = layout.fields.position.flatten(0, 1)
    if max(axes) >= position.shape[1]:
        raise UserError(
            f"scan_order: axis {max(axes)} of positions that have {position.shape[1]}; "
            "axes are 0 time, then row, column, .. of the batch"
        )
    keys = [position[:, axis] * (-1 if reverse else 1) for axis in reversed(axes)]
    # Documents and padding keep their places: the last sort decides.
    keys.append(begins(layout).flatten().long().cumsum(0))
    index = torch.arange(len(position), device=position.device)
    for key in keys:
        index = index[key[index].argsort(stable=True)]
    return index


class ScanOrder(Mixer):
    """Permute each document's places, run the mixer in that order, permute back.

    Only under a full mask: any order but that of time shows a token its future, so under other
    masks the mixer runs in the order of time. Layers of a pattern alternate orders.

    Source: Li et al. 2024, Mamba-ND (arXiv:2402.05892), section 3.2.
    """

    caps = Caps(causal=True, step=True)

    def __init__(self, inner: Mixer, axes: tuple[int, ...], reverse: bool):
        super().__init__()
        self.inner, self.axes, self.reverse = inner, axes, reverse

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        return self.inner.shares(serving)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        refuse_state("scan_order", ctx, state)
        if ctx.mask.hint != "full":
            return self.inner(x_BTD, ctx, state)
        index = ordered(ctx.layout, self.axes, self.reverse)
        # The mixer's time is the order itself: its positions are those of the places.
        causal = replace(elsewhere(ctx, ctx.layout), mask=Causal())
        out = self.inner(gathered(x_BTD, index), causal)
        back = torch.empty_like(index).scatter_(
            0, index, torch.arange(len(index), device=index.device)
        )
        return Out(gathered(out.y, back), None, None, out.aux)

    def initial_state(self, n: int, max_len: int) -> State | None:
        return self.inner.initial_state(n, max_len)

    def state_bytes(self, n: int, max_len: int) -> int:
        return self.inner.state_bytes(n, max_len)


@MIXERS.register("scan_order")
class ScanOrderConfig(Config):
    """A mixer over the places of a grid, sorted by its axes."""

    kind: Literal["scan_order"] = "scan_order"
    inner: MIXERS.field = Field(  # type: ignore[valid-type]
        default="mamba", validate_default=True
    )
    axes: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="position axes, most important first: 0 time, 1 row, .."),
    ] = (0,)
    reverse: Annotated[bool, Field(description="from the far corner")] = False

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> ScanOrder:
        inner = self.inner.build(d_model, linear or DenseConfig().build)
        return ScanOrder(inner, self.axes, self.reverse)

    @classmethod
    def smallest(cls) -> ScanOrderConfig:
        return cls(inner=MIXERS.get("gated_scan").smallest())
