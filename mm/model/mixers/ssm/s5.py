"""Simplified state space with one state for all channels (S5).

B rows, T tokens, D model, W complex states, N slots.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.kernels.complex_scan import complex_scan, multiply
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.mixers.ssm.hippo_matrices import StepsConfig
from mm.model.mixers.ssm.s4d import eigenvalues
from mm.model.mixers.ssm.scan import DiagonalScan
from mm.registry import MIXERS
from mm.state import State


class S5(Mixer):
    """``gelu(y)`` with ``y = Re(C h) + d * x`` and ``h' = diag(l) h + B x``.

    Inputs are held between steps (zoh), one time step a state; B and C are full matrices.

    States begin as blocks of HiPPO-LegS's normal part.

    Source: Smith et al. 2022 (arXiv:2208.04933); init from HiPPO-LegS by blocks: there.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: S5Config, linear: LinearFactory):
        super().__init__()
        self.config, W = config, config.states
        self.inner = linear(d_model, 2 * W, "inner")
        self.out = linear(2 * W, d_model, "out")
        self.scan = DiagonalScan(2 * W)
        self.log_rate = nn.Parameter(torch.empty(W))
        self.frequency = nn.Parameter(torch.empty(W))
        self.log_step = nn.Parameter(torch.empty(W))
        self.skip = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        c = self.config
        rate, frequency = eigenvalues("legs", c.states // c.blocks)
        with torch.no_grad():
            self.log_rate.copy_(rate.log().repeat(c.blocks))
            self.frequency.copy_(frequency.repeat(c.blocks))
            c.draw_steps(self.log_step)
        nn.init.normal_(self.skip)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Decays and what they leave for inputs, each `(2W,)`: real parts, then imaginary ones."""
        wide = torch.promote_types(self.log_rate.dtype, torch.float32)
        step, im = self.log_step.to(wide).exp(), self.frequency.to(wide)
        re = -self.log_rate.to(wide).exp()
        size = torch.exp(step * re)
        a = torch.cat((size * torch.cos(step * im), size * torch.sin(step * im)))
        one = torch.cat((torch.ones_like(re), torch.zeros_like(re)))
        # (a - 1) / l, as a product with the conjugate.
        return a, multiply(a - one, torch.cat((re, -im)) / (re**2 + im**2).repeat(2))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        a, gain = self.discrete()
        u = self.inner(x_BTD, ctx).to(a.dtype)
        h, after = self.scan(complex_scan, a, multiply(gain.expand_as(u), u), ctx, state)
        y = self.out(h.to(x_BTD.dtype), ctx) + self.skip * x_BTD
        return Out(F.gelu(y), after)


@MIXERS.register("s5")
class S5Config(StepsConfig):
    """Diagonal state space whose states all channels drive and read."""

    kind: Literal["s5"] = "s5"
    states: Annotated[int, Field(gt=0, description="complex, each for a conjugate pair")] = 64
    blocks: Annotated[int, Field(gt=0, description="of LegS that the states begin as")] = 1

    @model_validator(mode="after")
    def _fits(self) -> S5Config:
        if self.states % self.blocks:
            raise ValueError(f"s5: {self.blocks} blocks do not divide {self.states} states")
        return self

    layer = S5
    small = {"states": 4, "blocks": 2}
