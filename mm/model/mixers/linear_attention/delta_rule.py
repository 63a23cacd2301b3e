"""DeltaNet and Gated DeltaNet.

B rows, T tokens, D model, H heads, G key heads, K key width, V value width, C conv size.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.delta_rule import delta_rule
from mm.kernels.glu import glu
from mm.kernels.rms_norm import rms_norm
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, LinearMixer
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import NoConv, ShortConv
from mm.model.mixers.linear_attention.memory import MatrixMemory
from mm.model.norm import RMSNorm
from mm.registry import MIXERS
from mm.state import State

EPS = 1e-6  # added to the squared length of queries and keys


class DeltaRule(LinearMixer):
    """Every head keeps a map from keys to values; a token overwrites the value of its key.

    Queries, keys and values: a short causal convolution, SiLU, then unit length (queries, keys).
    Source: Yang et al. 2024, DeltaNet (arXiv:2406.06484), section 3.3; gate: Yang et al. 2024,
    Gated DeltaNet (arXiv:2412.06464), section 3.4, decay ``exp(-A softplus(a + bias))`` as in Dao &
    Gu 2024 (arXiv:2405.21060); negative eigenvalues: Grazzi et al. 2024 (arXiv:2411.12537); fewer
    key heads than heads: Qwen3-Next.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: DeltaRuleConfig, linear: LinearFactory):
        super().__init__()
        c, H = config, config.heads or default_heads(d_model, config.key_dim)
        if c.key_dim is None and d_model % H:
            raise ValueError(
                f"delta_rule: d_model {d_model} is not a multiple of heads {H}; set key_dim"
            )
        K = c.key_dim or d_model // H
        V = c.value_dim or K
        self.key_heads = G = c.key_heads or H
        if H % G:
            raise ValueError(f"delta_rule: heads {H} is not a multiple of key_heads {G}")
        self.heads, self.key_dim, self.value_dim = H, K, V
        self.top = 2.0 if c.negative_eigenvalues else 1.0
        width, gated = 2 * G * K + H * V, c.gate == "scalar"
        self.qkv = linear(d_model, width, "qkv")
        self.rates = linear(d_model, H * (1 + gated), "rates")
        self.gate = linear(d_model, H * V, "gate") if c.output_gate else None
        self.out = linear(H * V, d_model, "out")
        self.norm = RMSNorm(V, c.norm_eps)
        self.conv = ShortConv(width, c.conv_size, bias=False) if c.conv_size > 1 else NoConv()
        self.memory = MatrixMemory(H, K, V, change="map")
        self.log_decay = nn.Parameter(torch.empty(H)) if gated else None
        self.rate_bias = nn.Parameter(torch.empty(H)) if gated else None

    def init_weights(self) -> None:
        if self.log_decay is None or self.rate_bias is None:
            return
        with torch.no_grad():
            wide = torch.empty_like(self.rate_bias, dtype=torch.float32)
            self.log_decay.copy_(wide.uniform_(1, 16).log())
            # softplus(bias) log-uniform in [0.001, 0.1]
            rate = wide.uniform_(-3, -1).mul(torch.log(torch.tensor(10.0))).exp()
            self.rate_bias.copy_(rate.expm1().log())

    # ---- what the recurrence is given ----

    def features(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[dict[str, Tensor], State | None]:
        """Queries, keys, values `(B, T, H, .)`; float32 or wider strengths ``beta``, log decays."""
        found: dict[str, Tensor] = {}
        u, rates = self.qkv(x_BTD, ctx), self.rates(x_BTD, ctx)
        u, after = self.conv(u, ctx, state)
        H, G, K, V = self.heads, self.key_heads, self.key_dim, self.value_dim
        wide = torch.promote_types(rates.dtype, torch.float32)
        q, k, v = F.silu(u).split((G * K, G * K, H * V), -1)
        q, k, v = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))
        beta, *rest = rates.to(wide).unflatten(-1, (-1, H)).unbind(-2)
        if self.log_decay is not None and self.rate_bias is not None:
            step = F.softplus(rest[0] + self.rate_bias.to(wide))
            found["g"] = -self.log_decay.to(wide).exp() * step
        beta = self.top * beta.sigmoid()
        q, k = self._unit(q, K**-0.5), self._unit(k)
        if G < H:  # a query and a key for each group of heads
            q, k = (x.repeat_interleave(H // G, dim=2) for x in (q, k))
        return {"q": q, "k": k, "v": v, "beta": beta, **found}, after

    def _unit(self, x: Tensor, length: float = 1.0) -> Tensor:
        """``length x / |x|`` over the last dimension, an RMS norm with one scale for all."""
        K = self.key_dim
        return rms_norm(x, x.new_full((K,), length * K**-0.5), EPS / K)

    # ---- the recurrence ----

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        parts = (f["q"], f["k"], f["v"], f["beta"], f.get("g"))
        return self.memory(delta_rule, parts, ctx, state)

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """`(B, H, T, T)`: what each token reads of each value; quadratic, for looking and tests.

        ``(Q K^T * D) (I + tril(beta K K^T * D, -1))^{-1} beta`` with decays D between tokens.
        """
        q, k, beta = f["q"], f["k"], f["beta"].transpose(1, 2)[..., None]
        T, document = q.shape[1], ctx.layout.fields.document
        seen = (document[:, :, None] == document[:, None]) & (document > 0)[:, :, None]
        seen = (seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril())[:, None]
        log = f["g"].cumsum(1).transpose(1, 2) if "g" in f else torch.zeros_like(beta[..., 0])
        between = (log[..., None] - log[..., None, :]).masked_fill(~seen, -torch.inf).exp()
        queries = torch.einsum("bthk,bshk->bhts", q, k) * between
        keys = torch.einsum("bthk,bshk->bhts", k, k) * between
        written = torch.linalg.solve_triangular(
            (beta * keys).tril(-1), beta[..., 0].diag_embed(), upper=False, unitriangular=True
        )
        return queries @ written

    # ---- what leaves ----

    def finish(self, o: Tensor, x_BTD: Tensor, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """Norm by head and gate, then the output projection."""
        y = self.norm(o).flatten(2)
        if self.gate is not None:
            y = glu(self.gate(x_BTD, ctx), y.to(x_BTD.dtype))
        return self.out(y.to(x_BTD.dtype), ctx)


WIDEST = 256  # keys that the kernels of a GPU take


def default_heads(d_model: int, key_dim: int | None) -> int:
    """4 heads; twice as many, and again, while their keys were wider than `WIDEST`."""
    heads = 4
    while key_dim is None and d_model // heads > WIDEST and d_model % (2 * heads) == 0:
        heads *= 2
    return heads


@MIXERS.register("delta_rule")
class DeltaRuleConfig(LayerConfig):
    """Delta rule (fast weights that overwrite), optionally gated."""

    kind: Literal["delta_rule"] = "delta_rule"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    heads: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="default: 4, or more so that a key is at most 256 wide"
    )
    key_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None
    value_dim: Annotated[int, Field(gt=0, description="default: key_dim")] | None = None
    key_heads: int | None = Field(
        default=None, gt=0, description="query and key heads; default: heads"
    )
    conv_size: int = Field(default=4, gt=0, description="width of the causal convolution; 1: none")
    gate: Literal["none", "scalar"] = Field(
        default="none", description="decay of the state, one for each head"
    )
    negative_eigenvalues: bool = Field(
        default=False, description="writing strengths in (0, 2), for tracking states, not (0, 1)"
    )
    output_gate: bool = Field(default=False, description="SiLU gate after the norm of the output")
    norm_eps: Annotated[float, Field(gt=0, le=1, description="of the norm of the output")] = 1e-6

    layer = DeltaRule
    small = {
        "heads": 2,
        "key_dim": 4,
        "value_dim": 6,
        "gate": "scalar",
        "negative_eigenvalues": True,
        "output_gate": True,
    }
