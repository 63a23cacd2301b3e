"""Linear recurrent unit.

B rows, T tokens, D model, W complex channels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.kernels.complex_scan import complex_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.ssm.scan import DiagonalScan
from mm.registry import MIXERS
from mm.state import State


class LRU(Mixer):
    """``y_t = Re(C h_t) + d * u_t`` with ``h_t = lambda * h_{t-1} + gamma * (B u_t)``.

    ``lambda = exp(-exp(nu) + i exp(theta))`` keeps ``|lambda| < 1`` whatever is learned; ``gamma``
    begins as ``sqrt(1 - |lambda|^2)``, so that the state's variance does not grow with memory.

    Source: Orvieto et al. 2023 (arXiv:2303.06349), eq. 4 and 8, sections 3.2-3.4, appendix A
    (initialisation).
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: LRUConfig, linear: LinearFactory):
        super().__init__()
        self.config = config
        self.width = width = config.width or d_model
        # Complex matrices as real ones: B makes both parts, C reads both (its sign is in the
        # weight).
        self.inner = linear(d_model, 2 * width, "inner")
        self.out = linear(2 * width, d_model, "out")
        self.scan = DiagonalScan(2 * width)
        self.nu = nn.Parameter(torch.empty(width))
        self.theta = nn.Parameter(torch.empty(width))
        self.gamma = nn.Parameter(torch.empty(width))  # its logarithm
        self.skip = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        low, high = self.config.r_min, self.config.r_max
        with torch.no_grad():
            # Uniform on the ring's area: |lambda|^2 is uniform.
            u = torch.empty_like(self.nu, dtype=torch.float32).uniform_(1e-4, 1 - 1e-4)
            nu = -0.5 * (u * (high**2 - low**2) + low**2).log()
            self.nu.copy_(nu.log())
            self.gamma.copy_(0.5 * (-torch.expm1(-2 * nu)).log())
            phase = torch.empty_like(u).uniform_(1e-4, 1.0) * self.config.max_phase
            self.theta.copy_(phase.log())
        nn.init.normal_(self.skip)
        self.inner.rescale(0.5**0.5)  # variance 1 / (2 D) for each part

    def eigenvalues(self) -> Tensor:
        """Lambda as `(2W,)`: real parts, then imaginary ones; float32 or wider."""
        wide = torch.promote_types(self.nu.dtype, torch.float32)
        size, phase = torch.exp(-self.nu.to(wide).exp()), self.theta.to(wide).exp()
        return torch.cat((size * phase.cos(), size * phase.sin()))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        u = self.inner(x_BTD, ctx)
        a = self.eigenvalues()
        b = u.to(a.dtype) * self.gamma.to(a.dtype).exp().repeat(2)
        h, after = self.scan(complex_scan, a, b, ctx, state)
        return Out(self.out(h.to(x_BTD.dtype), ctx) + self.skip * x_BTD, after)


@MIXERS.register("lru")
class LRUConfig(LayerConfig):
    """Linear recurrent unit: a complex diagonal recurrence with fixed decays."""

    kind: Literal["lru"] = "lru"
    width: int | None = Field(default=None, gt=0, description="complex channels; default d_model")
    r_min: Annotated[float, Field(ge=0, lt=1)] = 0.4
    r_max: float = Field(default=0.99, gt=0, lt=1, description="|lambda| begins in [r_min, r_max]")
    max_phase: Annotated[float, Field(gt=0, le=2 * math.pi)] = 2 * math.pi

    @model_validator(mode="after")
    def _ring(self) -> LRUConfig:
        if self.r_min >= self.r_max:
            raise ValueError(f"lru: r_min {self.r_min} is not below r_max {self.r_max}")
        return self

    layer = LRU
    small = {"width": 6}
