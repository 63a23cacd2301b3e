"""Mamba.

B rows, T tokens, D model, E inner width, S states of a channel, K rank of the step size, N slots, R
rows, L their length, C conv size.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.glu import glu
from mm.kernels.selective_scan import selective_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import ShortConv
from mm.model.mixers.ssm.scan import Hidden, RecurrentState, starts
from mm.model.norm import RMSNorm
from mm.model.sequence import decay
from mm.model.varlen import PackedRows
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of

STEP = (1e-3, 1e-1)  # range of the initial step sizes, log-uniform; the paper's section 3.6


class SelectiveScan(RecurrentState):
    """`selective_scan` over the documents of a call; keeps h `(N, S, E)`, float32 or wider."""

    def forward(
        self,
        u_BTE: Tensor,
        dt_BTE: Tensor,
        a_SE: Tensor,
        b_BTS: Tensor,
        c_BTS: Tensor,
        skip_E: Tensor,
        ctx: Ctx,
        state: State | None,
    ) -> tuple[Tensor, Hidden | None]:
        """Outputs `(B, T, E)` and the State after the call; arguments as in `selective_scan`."""

        def fresh() -> Tensor:
            reset = starts(ctx.layout)
            return selective_scan(u_BTE, dt_BTE, a_SE, b_BTS, c_BTS, skip_E, reset)[0]

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            # A position of zeros leaves the state as it is: the last one is that of the last token.
            # Selected, not multiplied: what fills a row may hold inf.
            only = lambda x: torch.where(docs.valid[..., None], docs.unpack(x), 0.0)
            u, dt, b = only(u_BTE), only(dt_BTE), only(b_BTS)
            return selective_scan(u, dt, a_SE, b, docs.unpack(c_BTS), skip_E, None, before)

        if state is None:
            total = lambda: (dt_BTE.sum(1)[:, None] * a_SE).exp()
            return self.across(fresh, run, ctx, lambda: decay(total, *self.shape)), None
        return self.advance(run, ctx, state)


class Mamba(Mixer):
    """``out(silu(z) * ssm(silu(conv(x))))`` with ``x, z = inner(input)``.

    Step size, B and C are read from the convolved ``x``.

    Source: Gu & Dao 2023 (arXiv:2312.00752), section 3.4, figure 3 and algorithm 2; A from S4D-real
    (section 3.6). The norms of step size, B and C: Lieber et al. 2024, Jamba (arXiv:2403.19887).
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: MambaConfig, linear: LinearFactory):
        super().__init__()
        width, states = config.expand * d_model, config.states
        self.states, self.rank = states, (rank := config.rank or -(-d_model // 16))
        self.inner = linear(d_model, 2 * width, "inner")
        self.select = linear(width, rank + 2 * states, "select")
        self.step = linear(rank, width, "step")
        self.out = linear(width, d_model, "out")
        self.conv = ShortConv(width, config.conv_size, config.conv_bias, "uniform")
        self.scan = SelectiveScan(states, width)
        self.step_bias = nn.Parameter(torch.empty(width))
        self.log_rate = nn.Parameter(torch.empty(states, width))  # log(-A), transposed
        self.skip = nn.Parameter(torch.empty(width))
        sizes = (rank, states, states) if config.norms else ()
        self.norms = nn.ModuleList(RMSNorm(size) for size in sizes)

    def init_weights(self) -> None:
        nn.init.ones_(self.skip)
        weight = getattr(self.step, "weight", None)
        if isinstance(weight, nn.Parameter):
            nn.init.uniform_(weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            wide = torch.empty_like(self.step_bias, dtype=torch.float32)
            dt = wide.uniform_(math.log(STEP[0]), math.log(STEP[1])).exp()
            self.step_bias.copy_(dt + (-(-dt).expm1()).log())  # inverse of the softplus
            rate = torch.arange(1, self.states + 1, device=wide.device, dtype=torch.float32)
            self.log_rate.copy_(rate.log()[:, None].expand_as(self.log_rate))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, hidden = parts_of(state, 2)
        x, z = self.inner(x_BTD, ctx).chunk(2, dim=-1)
        u, tail = self.conv(x, ctx, tail)
        u = F.silu(u)
        read = self.select(u, ctx).split((self.rank, self.states, self.states), dim=-1)
        if len(self.norms):
            read = tuple(norm(part) for norm, part in zip(self.norms, read, strict=True))
        low, b, c = read
        wide = torch.promote_types(u.dtype, torch.float32)
        dt = F.softplus(self.step(low, ctx).to(wide) + self.step_bias.to(wide))
        y, hidden = self.scan(u, dt, self._rates(), b, c, self.skip, ctx, hidden)
        return Out(self.out(glu(z, y, "silu"), ctx), join_parts(tail, hidden))

    def _rates(self) -> Tensor:
        """A, transposed: `(S, E)` float32 or wider."""
        return -self.log_rate.to(torch.promote_types(self.log_rate.dtype, torch.float32)).exp()


@MIXERS.register("mamba")
class MambaConfig(LayerConfig):
    """Selective state space model (Mamba-1)."""

    kind: Literal["mamba"] = "mamba"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    expand: Annotated[int, Field(gt=0, description="inner width / d_model")] = 2
    states: Annotated[int, Field(gt=0, description="states of a channel")] = 16
    conv_size: Annotated[int, Field(gt=1, description="width of the causal convolution")] = 4
    conv_bias: Annotated[bool, Field(description="of the convolution")] = True
    rank: int | None = Field(
        default=None, gt=0, description="of the step size; default d_model / 16"
    )
    norms: Annotated[bool, Field(description="RMS norms of step size, B and C (Jamba)")] = False

    layer = Mamba
    small = {"expand": 1, "states": 3}
