"""Depth by repetition: the same layers several times, each visit with a State of its own.

B rows, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Sum
from mm.model.backbones.stack import Stack, StackConfig
from mm.model.context import Ctx
from mm.model.layer import Block, LinearFactory
from mm.model.linears.dense import dense
from mm.model.norm import Kind
from mm.registry import BACKBONES


class Looped(Stack):
    """A stack whose layers run ``loops`` times, with shared weights.

    With ``halting`` every token says after each round how much of its answer that round gives; a
    token whose shares reach 1 stays as it is in the rounds after. All rounds run for all tokens, on
    all ranks; ``ponder`` in `Out.aux` is the rounds that a token took and the share of its last.

    Source: Dehghani et al. 2018, Universal Transformers (arXiv:1807.03819), section 2; halting:
    Graves 2016 (arXiv:1603.08983), eq. 5 to 12, without its mean of states.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        d_model: int,
        eps: float,
        recompute: str,
        last: Kind | Literal["none"],
        loops: int,
        halting: float | None,
    ):
        super().__init__(layers, d_model, eps, recompute, last)
        self.loops, self.halting = loops, halting
        if halting is not None:
            self.halt_weight = nn.Parameter(torch.empty(d_model))
            self.halt_bias = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        super().init_weights()
        if self.halting is not None:
            nn.init.zeros_(self.halt_weight)
            # A token begins with equal shares: sigmoid(bias) = 1 / loops.
            nn.init.constant_(self.halt_bias, -torch.tensor(self.loops - 1.0).log().item())

    def default_path(self) -> list[int]:
        return super().default_path() * self.loops

    def watch(self, ctx: Ctx) -> Halting | None:
        return None if self.halting is None else Halting(self, ctx)


class Halting:
    """One pass of a `Looped` stack that halts."""

    def __init__(self, stack: Looped, ctx: Ctx):
        self.stack, self.real = stack, ctx.layout.fields.document > 0
        self.round = 0
        self.given: Tensor | None = None  # (B, T) shares so far, in float32 or wider
        self.answer: Tensor | None = None
        self.before: Tensor | None = None  # what the round began with
        self.ponder: Tensor | None = None

    def see(self, visit: int, x_BTD: Tensor) -> Tensor:
        stack = self.stack
        if (visit + 1) % len(stack.layers):
            return x_BTD
        self.round += 1
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        score = F.linear(x_BTD.to(wide), stack.halt_weight.to(wide)[None]) + stack.halt_bias
        share = score.squeeze(-1).sigmoid()
        zero = torch.zeros_like(share)
        given = zero if self.given is None else self.given
        assert stack.halting is not None
        on = given < 1 - stack.halting
        ends = on & ((given + share >= 1 - stack.halting) | (self.round == stack.loops))
        rest = 1 - given
        share = torch.where(ends, rest, torch.where(on, share, zero))
        self.given = given + share
        # Rounds taken, and the rest that the last one got: its gradient makes halting sooner pay.
        took = on.to(wide) + torch.where(ends, rest, zero)
        self.ponder = took if self.ponder is None else self.ponder + took
        x = x_BTD if self.before is None else torch.where(on[..., None], x_BTD, self.before)
        # Chosen, not multiplied: what is padding may hold inf.
        part = torch.where(on[..., None], x_BTD * share[..., None].to(x_BTD.dtype), 0)
        self.answer = part if self.answer is None else self.answer + part
        self.before = x
        return x

    def result(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Sum]]:
        assert self.answer is not None and self.ponder is not None
        total = torch.where(self.real, self.ponder, 0).sum().float()
        return self.answer, self.stack.report(ponder=Sum(total, self.real.sum().float()))


@BACKBONES.register("looped")
class LoopedConfig(StackConfig):
    """A stack whose layers run several times; deep for its weights, and for its time."""

    kind: Literal["looped"] = "looped"  # type: ignore[assignment]
    loops: Annotated[int, Field(ge=2, le=64, description="times that the layers run")] = 4
    halting: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="each token weighs its rounds, until all but this share is given; weigh the "
        "rounds by objective.aux_weights: {ponder: 0.01}",
    )

    small = {**StackConfig.small, "loops": 2, "halting": 0.01}

    def build(self, d_model: int, linear: LinearFactory = dense) -> Looped:
        layers = self.build_layers(d_model, linear)
        return Looped(
            layers, d_model, self.eps, self.recompute, self.norm, self.loops, self.halting
        )
