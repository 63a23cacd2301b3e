"""Linear attention and its gated kin as settings of one layer.

B rows, T tokens, D model, H heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.kernels import device
from mm.kernels.glu import glu
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, LinearMixer, Provider
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import NoConv, ShortConv
from mm.model.mixers.linear_attention.lower_bounds import shared_bound, shared_bounds
from mm.model.mixers.linear_attention.memory import MatrixMemory
from mm.model.norm import HeadNorm, RMSNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import refuse_drawn
from mm.registry import MIXERS, PositionField
from mm.state import State

EPS = 1e-6  # of the normaliser: a query that no key answers reads zeros


class LinearAttention(LinearMixer):
    """``o_t = S_t^T phi(q_t)``, ``S_t = diag(a_t) S_{t-1} + phi(k_t) v_t^T``; the rest is settings.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236), eq. 8-20; decay by head and token, by
    channel, gate and norm: Yang et al. 2023, GLA (arXiv:2312.06635), section 4; keys from decays:
    Qin et al. 2024, HGRN2 (arXiv:2404.07904), section 3; steps and skip: Dao & Gu 2024, Mamba-2
    (arXiv:2405.21060), sections 6 and 7.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: LinearAttentionConfig, linear: LinearFactory):
        super().__init__()
        c, H = config, config.heads
        width = partial(head_width, c.kind, H, d_model)
        key_dim = c.key_dim or width(c.expand_key, "expand_key")
        value_dim = width(c.expand_value, "expand_value")
        position = c.position.build(key_dim)
        rotates = position.key or type(position).rotate is not Position.rotate
        if c.position.kind != "none" and not rotates:
            raise ValueError(
                f"linear_attention: position '{c.position.kind}' does not rotate keys, and "
                "there are no scores to change: use none or rope"
            )
        refuse_drawn(position, "linear_attention")
        self.config, self.position = config, position
        self.heads, self.key_heads = H, c.key_heads or H
        self.key_dim, self.value_dim = key_dim, value_dim
        keys = self.key_heads * key_dim
        self.sizes = (keys, keys if c.key == "free" else 0, H * value_dim)
        self.qkv = linear(d_model, sum(self.sizes), "qkv")
        self.out = linear(H * value_dim, d_model, "out")
        self.gate = linear(d_model, H * value_dim, "gate") if c.gate != "none" else None
        width = {"scalar": H, "step": H, "channel": keys}.get(c.decay)
        if width is not None:
            low = c.decay_rank if c.decay == "channel" else None
            self.decay_in = linear(d_model, low, "decay_in") if low else None
            self.decay = linear(low or d_model, width, "decay")
            self.decay_bias = nn.Parameter(torch.empty(width))
        self.decay_width = width or 0
        own = width is not None and isinstance(c.lower_bound, float)
        self.bound = nn.Parameter(torch.empty(self.decay_width)) if own else None
        if c.decay == "step":
            self.log_rate = nn.Parameter(torch.empty(H))
        if c.skip:
            self.skip = nn.Parameter(torch.empty(H))
        widths, groups = {"head": value_dim, "full": H * value_dim}, self.key_heads
        self.norm = RMSNorm(widths[c.norm], c.norm_eps) if c.norm in widths else None
        if c.norm == "key_head":
            self.norm = HeadNorm(groups, H * value_dim // groups, c.norm_eps)
        conv = lambda: ShortConv(sum(self.sizes), c.conv_size, c.conv_bias)
        self.conv = conv() if c.conv_size else NoConv()
        mapped = 1 + key_dim + key_dim**2 if c.feature == "taylor" else key_dim
        self.memory = MatrixMemory(H, mapped, value_dim + c.normalise)

    def init_weights(self) -> None:
        c = self.config
        if c.decay in ("scalar", "channel"):
            nn.init.zeros_(self.decay_bias)
        if self.bound is not None and isinstance(c.lower_bound, float):
            nn.init.constant_(self.bound, math.log(c.lower_bound / (1 - c.lower_bound)))
        if c.decay == "step":
            with torch.no_grad():
                # softplus(bias) log-uniform in [0.001, 0.1], rates uniform in [1, 16].
                step = torch.empty_like(self.decay_bias).uniform_(math.log(1e-3), math.log(0.1))
                self.decay_bias.copy_(step.exp().expm1().log())
                self.log_rate.copy_(torch.empty_like(self.log_rate).uniform_(1, 16).log())
        if c.skip:
            nn.init.ones_(self.skip)

    # ---- what the recurrence is given ----

    def features(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[dict[str, Tensor], State | None]:
        """Queries, keys and values `(B, T, H, .)` in `device.product_dtype`, rounded once.

        Log decays and skip are float32 or wider.
        """
        c, (B, T) = self.config, x_BTD.shape[:2]
        found: dict[str, Tensor] = {}
        u, after = self.conv(self.qkv(x_BTD, ctx), ctx, state)
        u = u.to(device.product_dtype(u))
        wide = torch.promote_types(u.dtype, torch.float32)
        # One operator rounds once whatever its operands are; of several, none but the last may.
        several = lambda x, *steps: x.to(wide) if sum(steps) > 1 else x
        rotates, maps = c.position.kind != "none", c.feature not in ("identity", "relu")
        q, k, v = u.split(self.sizes, dim=-1)
        q, k = several(q, rotates, maps, c.scale), several(k, rotates, maps)
        v = several(v, c.value == "silu", c.decay == "step", c.insert != 1)
        v = v.view(B, T, self.heads, self.value_dim)
        if c.value == "silu":
            v = F.silu(v)
        if c.skip:
            found["skip"] = v * self.skip.to(wide)[:, None]
        if c.decay == "constant":
            found["g"] = self._rates(v, wide)
        elif c.decay != "none":
            low = self.decay_in(x_BTD, ctx) if self.decay_in is not None else x_BTD
            raw = self.decay(low, ctx).to(wide) + self.decay_bias.to(wide)
            if c.decay == "step":
                step = F.softplus(raw)
                v = v * step[..., None]
                found["g"] = -step * self.log_rate.to(wide).exp() / c.temperature
            else:
                found["g"] = self._bounded(F.logsigmoid(raw), ctx) / c.temperature
        heads = lambda t: t.view(B, T, self.key_heads, self.key_dim)
        if c.decay == "channel":
            found["g"] = self._spread(heads(found["g"]))
        q = heads(q)
        if c.key == "free":
            q, k = self.position.rotate_call(ctx, q, heads(k))
            k = self._spread(self._map(k).to(u.dtype))
        else:
            k = -torch.expm1(found["g"])
        q = self._map(q)
        q = q * self.key_dim**-0.5 if c.scale else q
        q = self._spread(q.to(u.dtype))
        v = v * c.insert if c.insert != 1 else v
        return {"q": q, "k": k.to(u.dtype), "v": v.to(u.dtype), **found}, after

    def _rates(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """`(H,)` log decays that no token moves."""
        h = torch.arange(self.heads, device=like.device, dtype=dtype)
        if self.config.rates == "retnet":
            return torch.log1p(-torch.exp2(-5 - h)) * self.config.rate
        return -torch.exp2(-8 * (h + 1) / self.heads) * self.config.rate

    def provider(self) -> tuple[str, Callable[[int], Provider]] | None:
        return shared_bounds(self.decay_width) if self.config.lower_bound == "shared" else None

    def _bounded(self, g: Tensor, ctx: Ctx) -> Tensor:
        """``log(b + (1 - b) exp(g))`` for the layer's bound b."""
        if self.bound is not None:
            bound = self.bound.to(g)
            return torch.logaddexp(F.logsigmoid(bound), g + F.logsigmoid(-bound))
        bound = shared_bound(self, ctx)
        return (
            g if bound is None else torch.logaddexp(bound.log().to(g), g + (-bound.to(g)).log1p())
        )

    def _map(self, x: Tensor) -> Tensor:
        """Feature map of queries and keys: positive ones approximate a softmax.

        In float32 or wider where it is more than one operator.
        """
        feature = self.config.feature
        if feature in ("elu1", "taylor"):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if feature == "elu1":
            return F.elu(x) + 1
        if feature == "taylor":  # phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K)
            x = x * self.key_dim**-0.25
            square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
            return torch.cat((torch.ones_like(x[..., :1]), x, square), dim=-1)
        if feature == "softmax":
            return x.softmax(-1)
        return {"identity": lambda t: t, "silu": F.silu, "relu": F.relu}[feature](x)

    def _spread(self, x: Tensor) -> Tensor:
        """Key heads `(B, T, G, K)` to all heads."""
        if self.key_heads == self.heads:
            return x
        return x.repeat_interleave(self.heads // self.key_heads, dim=2)

    # ---- the recurrence ----

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        v = append_ones(f["v"]) if self.config.normalise else f["v"]
        o, after = self.memory(linear_attention, (f["q"], f["k"], v, f.get("g")), ctx, state)
        return (o[..., :-1] / (o[..., -1:] + EPS) if self.config.normalise else o), after

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """`(B, H, T, T)`: what each token reads of each value; quadratic, for looking and tests."""
        g = f.get("g")
        q, k = (f[n].to(torch.promote_types(f[n].dtype, torch.float32)) for n in "qk")
        B, T, H, _ = q.shape
        document = ctx.layout.fields.document
        seen = (document[:, :, None] == document[:, None]) & (document > 0)[:, :, None]
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        if g is not None and g.dim() < 4:
            log = g.expand(B, T, H).cumsum(1).transpose(1, 2)
            gap = (log[..., None] - log[..., None, :]).masked_fill(~seen[:, None], -torch.inf)
            a = torch.einsum("bthk,bshk->bhts", q, k) * gap.exp()
        elif g is not None:
            log = g.cumsum(1)
            gap = log[:, :, None] - log[:, None]
            gap = gap.masked_fill(~seen[..., None, None], -torch.inf)
            a = torch.einsum("bthk,bshk,btshk->bhts", q, k, gap.exp())
        else:
            a = torch.einsum("bthk,bshk->bhts", q, k).masked_fill(~seen[:, None], 0)
        return a / (a.sum(-1, keepdim=True) + EPS) if self.config.normalise else a

    # ---- what leaves ----

    def finish(self, o: Tensor, x_BTD: Tensor, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """Skip, norm and gate in the configured order, then the output projection."""
        c = self.config
        o = (o + f["skip"] if "skip" in f else o).to(x_BTD.dtype)
        z = self.gate(x_BTD, ctx).view_as(o) if self.gate is not None else None
        if c.gate_first and z is not None:
            o = self._normed(self._gated(o, z))
        else:
            o = self._normed(o)
            o = self._gated(o, z) if z is not None else o
        return self.out(o.flatten(2), ctx)

    def _gated(self, o: Tensor, z: Tensor) -> Tensor:
        if self.config.gate == "silu":
            return glu(z.to(o.dtype), o, "silu")
        return o * z.sigmoid().to(o.dtype)

    def _normed(self, o: Tensor) -> Tensor:
        if self.config.norm == "layer":
            wide = torch.promote_types(o.dtype, torch.float32)
            return F.layer_norm(o.to(wide), o.shape[-1:], eps=EPS).to(o.dtype)
        if self.norm is None:
            return o
        if isinstance(self.norm, HeadNorm):
            return self.norm(o.flatten(2).unflatten(2, (self.key_heads, -1))).view_as(o)
        return self.norm(o.flatten(2)).view_as(o) if self.config.norm == "full" else self.norm(o)


def append_ones(v: Tensor) -> Tensor:
    """Values with one more channel, whose outputs are the sums of weights."""
    return torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)


def head_width(kind: str, heads: int, d_model: int, expand: float, name: str) -> int:
    """Width of each of ``heads`` that share ``d_model * expand``; ``name``: of that factor."""
    width = d_model * expand / heads
    if width != int(width) or width < 1:
        raise ValueError(f"{kind}: {heads} heads do not divide d_model {d_model} * {name} {expand}")
    return int(width)


@MIXERS.register("linear_attention")
class LinearAttentionConfig(LayerConfig):
    """Linear attention with a feature map, a decay, a normaliser, a convolution, a norm, a gate."""

    kind: Literal["linear_attention"] = "linear_attention"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    heads: Annotated[int, Field(gt=0)] = 4
    key_heads: int | None = Field(
        default=None, gt=0, description="query and key heads; default: heads"
    )
    key_dim: int | None = Field(
        default=None, gt=0, description="per head; default: d_model * expand_key / heads"
    )
    expand_key: Annotated[float, Field(gt=0)] = 1.0
    expand_value: Annotated[float, Field(gt=0, description="all heads' values / d_model")] = 1.0
    feature: Literal["identity", "silu", "elu1", "relu", "taylor", "softmax"] = "elu1"
    value: Literal["identity", "silu"] = "identity"
    scale: Annotated[bool, Field(description="divide queries by sqrt(key_dim)")] = False
    normalise: Annotated[bool, Field(description="divide by the sum of weights")] = True
    position: PositionField = Field(default="none", validate_default=True)
    decay: Literal["none", "constant", "scalar", "channel", "step"] = "none"
    rates: Literal["retnet", "alibi"] = Field(
        default="retnet", description="constant decays over the heads"
    )
    rate: Annotated[float, Field(gt=0, description="factor of all constant log decays")] = 1.0
    temperature: float = Field(
        default=1.0, gt=0, description="log decays of tokens are divided by it; < 1: forget more"
    )
    insert: float = Field(
        default=1.0, gt=0, description="factor of what tokens write; < 1: remember less"
    )
    lower_bound: (
        Annotated[float, Field(gt=0, lt=1, description="what a learned bound of decays begins as")]
        | Literal["shared"]  # with all layers: 0 in the first, growing with depth
        | None
    ) = None
    decay_rank: int | None = Field(
        default=None, gt=0, description="of the channel decay's projection; default: full"
    )
    key: Literal["free", "one_minus_decay"] = "free"
    skip: Annotated[bool, Field(description="add a learned share of the token's own value")] = False
    conv_size: Annotated[int, Field(ge=0, description="of a short convolution; 0 = none")] = 0
    conv_bias: Annotated[bool, Field(description="of the convolution")] = True
    norm: Literal["none", "head", "layer", "full", "key_head"] = Field(
        default="none",
        description="RMS by head, layer norm by head without scale, RMS over all heads, "
        "RMS over the heads that share a key head",
    )
    norm_eps: Annotated[float, Field(gt=0, le=1, description="of an RMS norm")] = 1e-6
    gate: Literal["none", "silu", "sigmoid"] = "none"
    gate_first: Annotated[bool, Field(description="gate before the norm")] = False

    @model_validator(mode="after")
    def _fitting(self) -> LinearAttentionConfig:
        if self.normalise and self.feature in ("identity", "silu"):
            raise ValueError(
                f"normalise divides by a sum that feature '{self.feature}' lets vanish: "
                "use elu1, relu, taylor or softmax, or normalise: false"
            )
        if self.key == "one_minus_decay" and (
            self.decay != "channel" or self.feature == "taylor" or self.position.kind != "none"
        ):
            raise ValueError(
                "key 'one_minus_decay' needs decay: channel, another feature than taylor and "
                "position: none"
            )
        if self.lower_bound is not None and self.decay not in ("scalar", "channel"):
            raise ValueError(f"lower_bound needs decay: scalar or channel, not {self.decay}")
        if self.decay == "channel" and self.feature == "taylor":
            raise ValueError("a channel decay has a rate a key channel: not with feature 'taylor'")
        if self.heads % (self.key_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of key_heads {self.key_heads}")
        return self

    layer = LinearAttention
    small = {"heads": 2}


# Settings of one that such wrappers take, for their laws.
SMALL_SCALAR = {
    "kind": "linear_attention",
    "heads": 2,
    "feature": "silu",
    "normalise": False,
    "decay": "scalar",
    "conv_size": 3,
}


def require_head_decay(config: Config, kind: str, besides: str = "") -> LinearAttentionConfig:
    """``config``, for a wrapper ``kind`` of mixers whose matrix decays by head.

    Args:
        besides: what else it wraps, for the message.
    Raises:
        UserError: it is another mixer.
    """
    if isinstance(config, LinearAttentionConfig):
        if not config.normalise and config.decay != "channel":
            return config
    raise UserError(
        f"{kind} wraps {besides}a linear_attention with normalise: false and decays by head "
        "(decay: none, constant, scalar or step), e.g. the settings of mamba2"
    )
