"""Diagonal state space model.

B rows, T tokens, D model, N complex states a channel, P = 2 parts, R rows of one document, L their
length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.complex_scan import multiply
from mm.kernels.diagonal_ssm import diagonal_ssm
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.mixers.ssm.hippo_matrices import StepsConfig
from mm.model.mixers.ssm.scan import RecurrentState, starts
from mm.model.sequence import Link
from mm.registry import MIXERS
from mm.state import State

Init = Literal["lin", "inv", "legs", "real"]


def eigenvalues(init: Init, n: int) -> tuple[Tensor, Tensor]:
    """Rates ``-Re A`` and frequencies ``Im A`` `(N,)` float64, one of each conjugate pair.

    ``legs`` are the eigenvalues of the normal part of HiPPO-LegS of size 2N, ``lin`` and ``inv``
    approximate those of the Fourier and Legendre measures, ``real`` decays only.

    Source: Gu et al. 2022, S4D (arXiv:2206.11893), section 4; LegS: Gu et al. 2020
    (arXiv:2008.07669), eq. 3.
    """
    k = torch.arange(n, dtype=torch.float64)
    if init == "real":
        return k + 1, torch.zeros_like(k)
    half = torch.full_like(k, 0.5)
    if init == "lin":
        return half, math.pi * k
    if init == "inv":
        size = 2 * n
        return half, size / math.pi * (size / (2 * k + 1) - 1)
    p = torch.sqrt(2 * torch.arange(2 * n, dtype=torch.float64) + 1)
    # A + P P^T = -1/2 I + a skew matrix of p_n p_k / 2: its eigenvalues come in conjugate pairs.
    skew = torch.outer(p, p) / 2
    skew = skew.triu(1) - skew.tril(-1)
    return half, torch.linalg.eigvalsh(1j * skew)[n:]


class S4D(Mixer):
    """``out(gelu(y))`` with ``y = 2 Re(C h) + d * x`` and ``h' = A h + x`` discretised per channel.

    B is folded into C: only their product matters for a diagonal A.

    Source: Gu et al. 2022 (arXiv:2206.11893), eq. 2-3; S4: Gu et al. 2021 (arXiv:2111.00396).
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: S4DConfig, linear: LinearFactory):
        super().__init__()
        self.config, states, real = config, config.states, config.init == "real"
        self.log_rate = nn.Parameter(torch.empty(d_model, states))
        self.frequency = None if real else nn.Parameter(torch.empty(d_model, states))
        self.log_step = nn.Parameter(torch.empty(d_model))
        parts = 1 if real else 2  # of real states, C's imaginary part reads nothing
        self.readout = nn.Parameter(torch.empty(parts, d_model, states))
        self.skip = nn.Parameter(torch.empty(d_model))
        self.out = linear(d_model, d_model, "out")
        self.memory = RecurrentState(2, d_model, states)

    def init_weights(self) -> None:
        c = self.config
        rate, frequency = eigenvalues(c.init, c.states)
        with torch.no_grad():
            self.log_rate.copy_(rate.log().expand_as(self.log_rate))
            if self.frequency is not None:
                self.frequency.copy_(frequency.expand_as(self.frequency))
            c.draw_steps(self.log_step)
        # Complex standard normal.
        nn.init.normal_(self.readout, std=self.readout.shape[0] ** -0.5)
        nn.init.normal_(self.skip)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Decays and readout, each `(2, D, N)` float32 or wider.

        ``h_t = a h_{t-1} + x_t``, ``y_t = sum Re(c h_t)``.
        """
        wide = torch.promote_types(self.log_rate.dtype, torch.float32)
        dt = self.log_step.to(wide).exp()[:, None]
        re = -self.log_rate.to(wide).exp()
        im = self.frequency.to(wide) if self.frequency is not None else torch.zeros_like(re)
        if self.config.discretisation == "zoh":
            size = torch.exp(dt * re)
            a = torch.cat((size * torch.cos(dt * im), size * torch.sin(dt * im)), -1)
            # (a - 1) / A, as a product with the conjugate.
            one = torch.cat((torch.ones_like(re), torch.zeros_like(re)), -1)
            b = multiply(a - one, torch.cat((re, -im), -1) / (re**2 + im**2).repeat(1, 2))
        else:
            low_re, low_im = 1 - dt * re / 2, -dt * im / 2
            inverse = torch.cat((low_re, -low_im), -1) / (low_re**2 + low_im**2).repeat(1, 2)
            a = multiply(torch.cat((1 + dt * re / 2, dt * im / 2), -1), inverse)
            b = dt * inverse
        c = self.readout.to(wide)
        c = torch.cat((c[0], c[1] if c.shape[0] == 2 else torch.zeros_like(c[0])), -1)
        return self._pairs(a), self._pairs(2 * multiply(b, c))

    def _pairs(self, x: Tensor) -> Tensor:
        """`(D, 2N)` to `(2, D, N)`."""
        return torch.stack(x.chunk(2, -1))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        a, c = self.discrete()
        wide = lambda docs: docs.unpack(x_BTD.to(a.dtype))
        run = lambda docs, h: diagonal_ssm(wide(docs), a, c, None, h, docs.length)
        if state is None:
            fresh = lambda: diagonal_ssm(x_BTD, a, c, starts(ctx.layout))[0]
            y, after = self.memory.across(fresh, run, ctx, lambda: _link(a, x_BTD.shape[1])), None
        else:
            y, after = self.memory.advance(run, ctx, state)
        y = y.to(x_BTD.dtype) + self.skip * x_BTD
        return Out(self.out(F.gelu(y), ctx), after)


def _link(a_PDN: Tensor, n: int) -> Link:
    """``n`` tokens multiply a state by ``a ** n``, which every process knows."""

    def times(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

    # By squaring in float64: no logarithm of zero, and no rounding that grows with n.
    square = a_PDN.double().unbind(0)
    power: tuple[Tensor, ...] = (torch.ones_like(square[0]), torch.zeros_like(square[0]))
    for bit in range(n.bit_length()):
        if n >> bit & 1:
            power = times(power, square)
        square = times(square, square)
    known = [x.to(a_PDN.dtype) for x in power]
    return Link(lambda _, h, own: own + torch.stack(times(tuple(known), h.unbind(1)), 1))


@MIXERS.register("s4d")
class S4DConfig(StepsConfig):
    """Diagonal state space model with fixed dynamics per channel."""

    kind: Literal["s4d"] = "s4d"
    states: int = Field(
        default=32, gt=0, description="complex states a channel, each for a conjugate pair"
    )
    init: Init = "legs"
    discretisation: Literal["zoh", "bilinear"] = "zoh"

    layer = S4D
    small = {"states": 3}
