"""Griffin's recurrent block.

B rows, T tokens, D model, W recurrent width, N slots, R rows, L their length, C conv size.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.glu import glu
from mm.kernels.linear_scan import linear_scan
from mm.kernels.rg_lru import rg_lru_gates
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import ShortConv
from mm.model.mixers.ssm.scan import DiagonalScan
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of

SHARPNESS = 8.0  # the constant c of the paper


class RGLRU(Mixer):
    """``out(gelu(gate(x)) * rg_lru(conv(in(x))))`` with block-diagonal recurrence and input gates.

    Source: De et al. 2024, Griffin (arXiv:2402.19427), section 2.4, eq. 1-4 and appendix A; the
    first token unscaled: Botev et al. 2024, RecurrentGemma (arXiv:2404.07839), as in its code.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: RGLRUConfig, linear: LinearFactory):
        super().__init__()
        width, self.heads = config.width or d_model, config.heads
        heads, conv_size = config.heads, config.conv_size
        if width % heads:
            raise ValueError(f"rg_lru: width {width} is not a multiple of heads {heads}")
        self.first_unscaled = config.first_unscaled
        self.inner = linear(d_model, 2 * width, "inner")
        self.out = linear(width, d_model, "out")
        self.conv = ShortConv(width, conv_size)
        self.scan = DiagonalScan(width)
        self.gate_weight = nn.Parameter(torch.empty(heads, width // heads, 2 * width // heads))
        self.gate_bias = nn.Parameter(torch.empty(heads, 2 * width // heads))
        self.decay = nn.Parameter(torch.empty(width))

    def init_weights(self) -> None:
        nn.init.normal_(self.gate_weight, std=self.gate_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.gate_bias)
        with torch.no_grad():
            # a ** c uniform in [0.9, 0.999]: softplus(decay) = -log(a ** c) / c
            rate = (
                -torch.empty_like(self.decay, dtype=torch.float32).uniform_(0.9, 0.999).log()
                / SHARPNESS
            )
            self.decay.copy_(rate.expm1().log())

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        conv, hidden = parts_of(state, 2)
        gate, u = self.inner(x_BTD, ctx).chunk(2, dim=-1)
        u, conv = self.conv(u, ctx, conv)
        a, b = self._gates(u)
        if self.first_unscaled:
            first = ctx.layout.fields.position[..., :1] == 0
            b = torch.where(first, self._input(u).to(b.dtype), b)
        h, hidden = self.scan(linear_scan, a, b, ctx, hidden)
        return Out(self.out(glu(gate, h, "gelu_tanh"), ctx), join_parts(conv, hidden))

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Decay and input of the recurrence, float32 or wider. ``u`` `(R, L, W)`."""
        R, L, W = u.shape
        heads = u.reshape(R * L, self.heads, W // self.heads).transpose(0, 1)
        gates = torch.bmm(heads, self.gate_weight.to(u.dtype))
        rate = SHARPNESS * F.softplus(self.decay.to(torch.promote_types(u.dtype, torch.float32)))
        a, b = rg_lru_gates(gates, self.gate_bias, rate, u.reshape(R * L, W).to(gates.dtype))
        return a.view(R, L, W), b.view(R, L, W)

    def _input(self, u: Tensor) -> Tensor:
        """``sigmoid(input gate) * u``, float32 or wider."""
        wide = torch.promote_types(u.dtype, torch.float32)
        heads, K = u.unflatten(-1, (self.heads, -1)), u.shape[-1] // self.heads
        gate = torch.einsum("blhk,hkj->blhj", heads, self.gate_weight[..., K:].to(u.dtype))
        return ((gate.to(wide) + self.gate_bias[:, K:].to(wide)).sigmoid() * heads).flatten(-2)


@MIXERS.register("rg_lru")
class RGLRUConfig(LayerConfig):
    """Real-gated linear recurrent unit in Griffin's block."""

    kind: Literal["rg_lru"] = "rg_lru"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    heads: Annotated[int, Field(gt=0, description="blocks of the block-diagonal gates")] = 4
    conv_size: Annotated[int, Field(gt=1, description="width of the causal convolution")] = 4
    first_unscaled: bool = Field(
        default=False, description="the token at place 0 enters as it is, without sqrt(1 - a^2)"
    )

    layer = RGLRU
    small = {"heads": 2}
