"""Structured state space (S4).

B rows, T tokens, D model, N states of a channel as N / 2 complex ones, R rows of one document, L
their length.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.mixers.ssm.dense import DenseMemory
from mm.model.mixers.ssm.hippo_matrices import StepsConfig, nplr_legs
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import State

STEPS = 16  # tokens of a call up to which stepping is cheaper than powers of a matrix


class NplrStep(NamedTuple):
    """One bilinear step of ``h' = A h + B u`` for ``A = diag(rate) - P P^*``, without a matrix.

    ``h' = (I - dt / 2 A)^{-1} ((I + dt / 2 A) h + dt B u)``: Woodbury's identity inverts it, and
    both factors are diagonal plus rank one.

    Source: Gu et al. 2021 (arXiv:2111.00396), appendix C.2 (the recurrence in O(N)).
    """

    rate: Tensor  # (D, N / 2) complex
    p: Tensor  # (D, N / 2) complex
    b: Tensor  # (D, N / 2) complex
    read: Tensor  # (D, N) of the real states (Re h, Im h)
    half: Tensor  # (D, 1) dt / 2
    inverse: Tensor  # (D, N / 2) complex: of 1 - dt / 2 rate
    room: Tensor  # (D, 1) Woodbury's denominator

    def after(self, h: Tensor, u: Tensor) -> Tensor:
        """Complex states `(..., D, N / 2)` after one token.

        ``h`` `(..., D or 1, N / 2)`; ``u`` `(..., D or 1)` real.
        """
        # A conjugate pair reads P^* h + its conjugate: twice the real part.
        seen = lambda x: 2 * (self.p.conj() * x).real.sum(-1, keepdim=True)
        driven = 2 * self.half * self.b * u[..., None]
        ahead = (1 + self.half * self.rate) * h - self.half * self.p * seen(h) + driven
        back = self.half * self.p * (seen(self.inverse * ahead) / self.room)
        return self.inverse * (ahead - back)


class S4(Mixer):
    """``out(gelu(y))`` with ``y = C h + d * x`` and ``h' = (diag(l) - P P^*) h + B x``, bilinear.

    l, P and B begin as those of HiPPO-LegS; all are learned by channel, and the real parts of l
    stay negative, so that the system is stable. The recurrence is evaluated in chunks with powers
    of the transition matrix, which is exact, linear in the length and starts from any state; the
    paper's Cauchy kernel and Fourier transform give the same numbers. A few tokens that go on from
    a State are stepped in O(N) each (`NplrStep`), without any matrix.

    Source: Gu et al. 2021 (arXiv:2111.00396), section 3 and appendix C; ``- P P^*`` in place of
    ``- P Q^*``: Goel et al. 2022 (arXiv:2202.09729), section 4.1.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: S4Config, linear: LinearFactory):
        super().__init__()
        self.config, self.states, half = config, config.states, config.states // 2
        self.memory = DenseMemory(d_model, config.states)
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
            self.config.draw_steps(self.log_step)
        nn.init.normal_(self.readout, std=0.5**0.5)
        nn.init.normal_(self.skip)

    def system(self) -> NplrStep:
        """The bilinear step as vectors: O(N) a channel."""
        wide = torch.promote_types(self.log_rate.dtype, torch.float32)
        rate = torch.complex(-self.log_rate.to(wide).exp(), self.frequency.to(wide))
        p, b, c = (torch.complex(*x.to(wide)) for x in (self.low_rank, self.drive, self.readout))
        half = self.log_step.to(wide).exp()[:, None] / 2
        inverse = 1 / (1 - half * rate)
        room = 1 + half * 2 * (p.conj() * inverse * p).real.sum(-1, keepdim=True)
        read = torch.cat((2 * c.real, -2 * c.imag), -1)
        return NplrStep(rate, p, b, read, half, inverse, room)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Transitions `(D, N, N)`, inputs `(D, N)` and readouts `(D, 1, N)` of the real states.

        The real states are ``(Re h, Im h)``: `NplrStep.after` of every unit state and of the input
        alone.
        """
        system, n = self.system(), self.states // 2
        eye = torch.eye(n, dtype=system.read.dtype, device=system.read.device)
        basis = torch.cat((torch.complex(eye, 0 * eye), torch.complex(0 * eye, eye)))
        # (D, N, N / 2): row j is what state j becomes.
        a = system.after(basis[:, None], basis.new_zeros(1).real).movedim(0, 1)
        driven = system.after(basis.new_zeros(n), system.half.new_ones(1))
        b = torch.cat((driven.real, driven.imag), -1)
        return torch.cat((a.real, a.imag), -1).mT, b, system.read[:, None]

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        if state is not None and 0 < ctx.layout.max_seqlen <= STEPS:
            run = lambda docs, before: self._step_rows(docs, before, x_BTD)
            y, after = self.memory.advance(run, ctx, state)
        else:
            y, after = self.memory(x_BTD, *self.matrices(), ctx, state)
            y = y[..., 0]
        y = y.to(x_BTD.dtype) + self.skip * x_BTD
        return Out(self.out(F.gelu(y), ctx), after)

    def _step_rows(
        self, docs: PackedRows, before_RDN: Tensor, x_BTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Readouts `(R, L, D)` of a few tokens, one after another, and each row's last state."""
        system = self.system()
        h = torch.complex(*before_RDN.unflatten(-1, (2, -1)).unbind(2))
        states = []
        for u in docs.unpack(x_BTD).to(system.read.dtype).unbind(1):
            h = system.after(h, u)
            states.append(torch.cat((h.real, h.imag), -1))
        made = torch.stack(states, 1)
        return (made * system.read).sum(-1), docs.last(made, before_RDN)


@MIXERS.register("s4")
class S4Config(StepsConfig):
    """Structured state space: normal plus low-rank dynamics from HiPPO-LegS."""

    kind: Literal["s4"] = "s4"
    states: Annotated[int, Field(gt=0, multiple_of=2, description="real states a channel")] = 64

    layer = S4
    small = {"states": 4}
