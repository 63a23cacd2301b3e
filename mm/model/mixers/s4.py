"""Structured state space (S4). B rows, T tokens, D model, N states of a channel as N / 2 complex
ones, R rows of one document, L their length.
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
from mm.model.hippo import nplr_legs
from mm.model.layer import Ctx, Linear, Out
from mm.model.linears.dense import DenseConfig
from mm.registry import MIXERS
from mm.state import State


class S4(DenseMemory):
    """``out(gelu(y))`` with ``y = C h + d * x`` and ``h' = (diag(l) - P P^*) h + B x``, bilinear.

    l, P and B begin as those of HiPPO-LegS; all are learned by channel, and the real parts of l
    stay negative, so that the system is stable. The recurrence is evaluated in chunks with powers
    of the transition matrix, which is exact, linear in the length and starts from any state; the
    paper's Cauchy kernel and Fourier transform give the same numbers.

    Source: Gu et al. 2021 (arXiv:2111.00396), section 3 and appendix C; ``- P P^*`` in place of
    ``- P Q^*``: Goel et al. 2022 (arXiv:2202.09729), section 4.1.
    """

    def __init__(
        self, d_model: int, states: int, steps: tuple[float, float], linear: Callable[..., Linear]
    ):
        super().__init__(d_model, states)
        self.steps, half = steps, states // 2
        self.log_rate = nn.Parameter(torch.empty(d_model, half))
        self.frequency = nn.Parameter(torch.empty(d_model, half))
        self.low_rank = nn.Parameter(torch.empty(2, d_model, half))  # P, real and imaginary
        self.drive = nn.Parameter(torch.empty(2, d_model, half))  # B
        self.readout = nn.Parameter(torch.empty(2, d_model, half))  # C
        self.log_step = nn.Parameter(torch.empty(d_model))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out = linear(d_model, d_model, "out")

    def init_weights(self) -> None:
        rate, p, b = nplr_legs(self.states)
        with torch.no_grad():
            self.log_rate.copy_((-rate.real).log().expand_as(self.log_rate))
            self.frequency.copy_(rate.imag.expand_as(self.frequency))
            for to, value in ((self.low_rank, p), (self.drive, b)):
                to.copy_(torch.stack((value.real, value.imag))[:, None].expand_as(to))
            self.log_step.uniform_(math.log(self.steps[0]), math.log(self.steps[1]))
        nn.init.normal_(self.readout, std=0.5**0.5)
        nn.init.normal_(self.skip)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions `(D, N, N)`, inputs `(D, N)` and readouts `(D, 1, N)` of the real states
        ``(Re h, Im h)``.

        Woodbury's identity inverts the bilinear step: O(N^2) a channel, not O(N^3).
        """
        wide = torch.promote_types(self.log_rate.dtype, torch.float32)
        rate = torch.complex(-self.log_rate.to(wide).exp(), self.frequency.to(wide))
        p, b, c = (torch.complex(*x.to(wide)) for x in (self.low_rank, self.drive, self.readout))
        half = self.log_step.to(wide).exp()[:, None] / 2
        inverse = 1 / (1 - half * rate)
        room = 1 + half * 2 * (p.conj() * inverse * p).real.sum(-1, keepdim=True)

        def solved(r: Tensor) -> Tensor:
            """``(I - dt / 2 A)^-1 r`` for `(D, K, N / 2)` columns."""
            seen = 2 * (p.conj()[:, None] * inverse[:, None] * r).real.sum(-1, keepdim=True)
            return inverse[:, None] * (r - half[:, None] * p[:, None] * (seen / room[:, None]))

        n = self.states // 2
        eye = torch.eye(n, dtype=wide, device=p.device)
        basis = torch.cat((torch.complex(eye, 0 * eye), torch.complex(0 * eye, eye)))
        # A conjugate pair reads P^* h + its conjugate: twice the real part.
        seen = 2 * (p.conj()[:, None] * basis).real.sum(-1, keepdim=True)
        ahead = (1 + half * rate)[:, None] * basis - half[:, None] * p[:, None] * seen
        a = solved(ahead)  # (D, N, N / 2): row j is what state j becomes
        driven = solved((2 * half * b)[:, None])[:, 0]
        read = torch.cat((2 * c.real, -2 * c.imag), -1)[:, None]
        return torch.cat((a.real, a.imag), -1).mT, torch.cat((driven.real, driven.imag), -1), read

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        y, after = self.remembered(x_BTD, *self.matrices(), ctx, state)
        y = y[..., 0].to(x_BTD.dtype) + self.skip * x_BTD
        return Out(self.out(F.gelu(y), ctx), after)


@MIXERS.register("s4")
class S4Config(Config):
    """Structured state space: normal plus low-rank dynamics from HiPPO-LegS."""

    kind: Literal["s4"] = "s4"
    states: Annotated[int, Field(gt=0, multiple_of=2, description="real states a channel")] = 64
    step_min: Annotated[float, Field(gt=0)] = 0.001
    step_max: Annotated[float, Field(gt=0, description="time steps begin in this range")] = 0.1

    @model_validator(mode="after")
    def _steps(self) -> S4Config:
        if self.step_min > self.step_max:
            raise ValueError(f"s4: step_min {self.step_min} is above step_max {self.step_max}")
        return self

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> S4:
        steps = (self.step_min, self.step_max)
        return S4(d_model, self.states, steps, linear or DenseConfig().build)

    @classmethod
    def smallest(cls) -> S4Config:
        return cls(states=4)
