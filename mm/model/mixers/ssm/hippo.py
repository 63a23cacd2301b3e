"""Linear memory in orthogonal polynomials: LSSL and the Legendre memory unit.

B rows, T tokens, D model, E channels, N states of each, M readouts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.mixers.ssm.dense import DenseMemory
from mm.model.mixers.ssm.hippo_matrices import (
    Discretisation,
    Measure,
    StepsConfig,
    discretise,
    hippo,
)
from mm.registry import MIXERS
from mm.state import State


class HiPPOMemory(Mixer):
    """``out(gelu(C h)) + d * x`` with ``h' = A h + B u``, A and B those of a HiPPO measure.

    With ``trainable`` A is learned, one for all channels, as ``-P (D + T^-1) Q`` with diagonal P, D
    and Q and tridiagonal T: the HiPPO matrix is one of these, and where it begins.

    With ``window`` every channel has the time step 1 / window and each state is read; else time
    steps are learned by channel and C reads M mixtures of the states. A new call discretises anew:
    O(E N^3), which only the shared step of ``window`` avoids.

    Source: Gu et al. 2021, LSSL (arXiv:2110.13985), section 3.2; A learned in its class of
    transitions with low recurrence width, or fixed (LSSL-f of section 5.1);
    Voelker et al. 2019, Legendre memory units, section 2, in the form without feedback of Chilkuri
    & Eliasmith 2021 (arXiv:2102.11417), eq. 18-20.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: HiPPOConfig, linear: LinearFactory):
        super().__init__()
        self.config, channels = config, config.width or d_model
        self.memory = DenseMemory(channels, config.states)
        self.inner = linear(d_model, channels, "inner") if config.width else None
        reads = config.states if config.window else config.readouts
        self.out = linear(channels * reads, d_model, "out")
        if config.window is None:
            self.log_step = nn.Parameter(torch.empty(channels))
            self.readout = nn.Parameter(torch.empty(channels, reads, config.states))
        self.skip = nn.Parameter(torch.empty(d_model))
        if config.trainable:
            self.scales = nn.Parameter(torch.empty(2, config.states))  # P and Q
            self.diagonal = nn.Parameter(torch.empty(config.states))  # D
            # T: below, on and above the diagonal; the last of the outer two is not read.
            self.bands = nn.Parameter(torch.empty(3, config.states))

    def init_weights(self) -> None:
        c = self.config
        if c.window is None:
            c.draw_steps(self.log_step)
            nn.init.normal_(self.readout)
        nn.init.normal_(self.skip)
        if c.trainable:
            n = torch.arange(c.states, dtype=torch.float64)
            legs = c.measure == "legs"
            with torch.no_grad():
                self.scales.copy_((2 * n + 1).sqrt() if legs else torch.ones_like(n))
                self.diagonal.copy_(-n / (2 * n + 1) if legs else torch.full_like(n, -0.5))
                # The inverse of 1 on and -1 below the diagonal is 1 on and below it.
                self.bands.copy_(torch.tensor([[-1.0], [1.0], [0.0]]).expand(3, c.states))

    def transition(self, wide: torch.dtype) -> Tensor:
        """The learned A `(N, N)`."""
        left, right = self.scales.to(wide)
        below, on, above = self.bands.to(wide)
        banded = torch.diag(on) + torch.diag(below[:-1], -1) + torch.diag(above[:-1], 1)
        eye = torch.eye(len(on), dtype=wide, device=on.device)
        inverse = torch.linalg.solve(banded, eye)
        return -left[:, None] * (torch.diag(self.diagonal.to(wide)) + inverse) * right

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions, inputs and readouts as `dense_ssm` takes them, float32 or wider."""
        c, wide = self.config, torch.promote_types(self.skip.dtype, torch.float32)
        a, b = (x.to(self.skip.device, wide) for x in hippo(c.measure, c.states))
        if c.trainable:
            a = self.transition(wide)
        if c.window is not None:
            step = torch.full((1,), 1 / c.window, dtype=wide, device=a.device)
            return *discretise(a, b, step, c.discretisation), torch.eye(
                c.states, dtype=wide, device=a.device
            )[None]
        step = self.log_step.to(wide).exp()
        return *discretise(a, b, step, c.discretisation), self.readout.to(wide)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        u = self.inner(x_BTD, ctx) if self.inner is not None else x_BTD
        y, after = self.memory(u, *self.matrices(), ctx, state)
        y = F.gelu(y.flatten(2).to(x_BTD.dtype))
        return Out(self.out(y, ctx) + self.skip * x_BTD, after)


@MIXERS.register("hippo")
class HiPPOConfig(StepsConfig):
    """Polynomial memory with learned readouts; its defaults are LSSL-f."""

    kind: Literal["hippo"] = "hippo"
    measure: Measure = "legs"
    states: Annotated[int, Field(gt=0, description="coefficients a channel")] = 64
    discretisation: Discretisation = "bilinear"
    width: int | None = Field(default=None, gt=0, description="channels; default the model's own")
    readouts: Annotated[int, Field(gt=0, description="outputs a channel")] = 1
    window: float | None = Field(
        default=None, gt=0, description="tokens in a unit of time; default: learned"
    )
    trainable: Annotated[bool, Field(description="learn A, from where the measure has it")] = False

    @model_validator(mode="after")
    def _fits(self) -> HiPPOConfig:
        if self.trainable and self.measure not in ("legs", "lagt"):
            raise ValueError(
                f"hippo: trainable begins from legs or lagt, not {self.measure}; set measure: legs"
            )
        if self.measure == "fourier" and self.states % 2:
            raise ValueError(f"hippo: fourier has pairs of states, {self.states} is odd")
        return self

    layer = HiPPOMemory
    small = {"states": 4, "readouts": 2}
