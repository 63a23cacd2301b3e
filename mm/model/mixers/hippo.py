"""Linear memory in orthogonal polynomials: LSSL and the Legendre memory unit. B rows, T tokens, D
model, E channels, N states of each, M readouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import Config
from mm.model.dense_memory import DenseMemory
from mm.model.hippo import Discretisation, Measure, discretised, hippo
from mm.model.layer import Ctx, Linear, Out
from mm.model.linears.dense import DenseConfig
from mm.registry import MIXERS
from mm.state import State


class HiPPOMemory(DenseMemory):
    """``out(gelu(C h)) + d * x`` with ``h' = A h + B u``, A and B fixed by a HiPPO measure.

    With ``window`` every channel has the time step 1 / window and each state is read; else time
    steps are learned by channel and C reads M mixtures of the states. A new call discretises anew:
    O(E N^3), which only the shared step of ``window`` avoids.

    Source: Gu et al. 2021, LSSL (arXiv:2110.13985), section 3.2 and 5.1 with A fixed (LSSL-f);
    Voelker et al. 2019, Legendre memory units, section 2, in the form without feedback of Chilkuri
    & Eliasmith 2021 (arXiv:2102.11417), eq. 18-20.
    """

    def __init__(self, config: HiPPOConfig, d_model: int, linear: Callable[..., Linear]):
        channels = config.width or d_model
        super().__init__(channels, config.states)
        self.config = config
        self.inner = linear(d_model, channels, "inner") if config.width else None
        reads = config.states if config.window else config.readouts
        self.out = linear(channels * reads, d_model, "out")
        if config.window is None:
            self.log_step = nn.Parameter(torch.empty(channels))
            self.readout = nn.Parameter(torch.empty(channels, reads, config.states))
        self.skip = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        c = self.config
        if c.window is None:
            nn.init.uniform_(self.log_step, math.log(c.step_min), math.log(c.step_max))
            nn.init.normal_(self.readout)
        nn.init.normal_(self.skip)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions, inputs and readouts as `dense_ssm` takes them, float32 or wider."""
        c, wide = self.config, torch.promote_types(self.skip.dtype, torch.float32)
        a, b = (x.to(self.skip.device, wide) for x in hippo(c.measure, c.states))
        if c.window is not None:
            step = torch.full((1,), 1 / c.window, dtype=wide, device=a.device)
            return *discretised(a, b, step, c.discretisation), torch.eye(
                c.states, dtype=wide, device=a.device
            )[None]
        step = self.log_step.to(wide).exp()
        return *discretised(a, b, step, c.discretisation), self.readout.to(wide)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        u = self.inner(x_BTD, ctx) if self.inner is not None else x_BTD
        y, after = self.remembered(u, *self.matrices(), ctx, state)
        y = F.gelu(y.flatten(2).to(x_BTD.dtype))
        return Out(self.out(y, ctx) + self.skip * x_BTD, after)


@MIXERS.register("hippo")
class HiPPOConfig(Config):
    """Fixed polynomial memory with learned readouts; its defaults are LSSL."""

    kind: Literal["hippo"] = "hippo"
    measure: Measure = "legs"
    states: Annotated[int, Field(gt=0, description="coefficients a channel")] = 64
    discretisation: Discretisation = "bilinear"
    width: Annotated[int, Field(gt=0, description="channels; default the model's own")] | None = (
        None
    )
    readouts: Annotated[int, Field(gt=0, description="outputs a channel")] = 1
    window: (
        Annotated[float, Field(gt=0, description="tokens in a unit of time; default: learned")]
        | None
    ) = None
    step_min: Annotated[float, Field(gt=0)] = 0.001
    step_max: Annotated[float, Field(gt=0, description="learned steps begin in this range")] = 0.1

    @model_validator(mode="after")
    def _fits(self) -> HiPPOConfig:
        if self.step_min > self.step_max:
            raise ValueError(f"hippo: step_min {self.step_min} is above step_max {self.step_max}")
        if self.measure == "fourier" and self.states % 2:
            raise ValueError(f"hippo: fourier has pairs of states, {self.states} is odd")
        return self

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> HiPPOMemory:
        return HiPPOMemory(self, d_model, linear or DenseConfig().build)

    @classmethod
    def smallest(cls) -> HiPPOConfig:
        return cls(states=4, readouts=2)
