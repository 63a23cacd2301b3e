"""Mega: gated attention whose queries and keys have seen a moving average.

B rows, T tokens, D model, E averages of a channel, K width of queries and keys, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.diagonal_ssm import diagonal_ssm
from mm.kernels.linear_scan import linear_scan
from mm.layout import Fields, Layout
from mm.mask import Hint, Mask
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.model.length_buckets import LengthBuckets
from mm.model.mixers.attention.base import AttentionBase
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.model.mixers.ssm.scan import DiagonalScan, starts
from mm.model.positions.randomised import adds_to_input
from mm.registry import MIXERS, PositionField
from mm.state import State, join_parts, parts_of


@dataclass(frozen=True)
class SameChunk(Mask):
    """Tokens whose times fall into the same chunk of ``size``."""

    size: int
    hint: ClassVar[Hint] = "general"

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.size

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = (f.position[..., 0] // self.size for f in (q, k))
        return tq[:, :, None] == tk[:, None]


class MovingAverage(nn.Module):
    """``y_t = sum_e eta_e h_t``, ``h_t = alpha * beta x_t + (1 - alpha * delta) h_{t-1}``.

    Each channel has E of them.

    Source: Ma et al. 2022, Mega (arXiv:2209.10655), section 3.1 (multi-dimensional damped EMA).
    """

    def __init__(self, d_model: int, size: int):
        super().__init__()
        shape = (d_model, size)
        self.scan = DiagonalScan(d_model * size)
        self.alpha, self.delta = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.beta, self.eta = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def init_weights(self) -> None:
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.eta)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():  # the averages of a channel begin with unlike signs
            sign = torch.ones(self.beta.shape[1])
            sign[1::2] = -1
            self.beta.add_(sign.to(self.beta))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Decays and readouts `(D, E)` float32 or wider: ``h_t = a h_{t-1} + x_t``, ``y = c h``."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        alpha, delta = self.alpha.to(wide).sigmoid(), self.delta.to(wide).sigmoid()
        c = alpha * self.beta.to(wide) * self.eta.to(wide) * alpha.shape[1] ** -0.5
        return 1 - alpha * delta, c

    def forward(self, x: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, State | None]:
        a, c = self.coefficients()
        if state is None:
            pairs = (torch.stack((t, torch.zeros_like(t))) for t in (a, c))
            y, _ = diagonal_ssm(x, *pairs, starts(ctx.layout))
            return y.to(x.dtype), None
        (B, T, D), E = x.shape, a.shape[1]
        u = x.to(a.dtype)[..., None].expand(B, T, D, E).flatten(2)
        h, after = self.scan(linear_scan, a.flatten().expand(B, T, -1), u, ctx, state)
        return (h.view(B, T, D, E) * c).sum(-1).to(x.dtype), after


class Mega(AttentionBase):
    """``phi * h + (1 - phi) * x``, ``h = silu(W_h x' + U (gamma * o))``, o of one attention head.

    Values read x; queries, keys and gates read its moving average x'. With ``chunk`` each token
    attends within its own chunk of so many tokens and only the average crosses the borders
    (Mega-chunk): linear in the length, and so is the cache.

    Source: Ma et al. 2022 (arXiv:2209.10655), section 3, with softmax as the attention
    function.
    """

    knows = frozenset({"gain"})
    replays = True

    def __init__(self, d_model: int, config: MegaConfig, linear: LinearFactory):
        position = config.position.build(config.key_dim, heads=1, d_model=d_model)
        if adds_to_input(position):
            raise ValueError(
                f"mega: position '{config.position.kind}' is added to a layer's input, and queries "
                "and keys read an average of that: use rope, alibi, t5_bias or none"
            )
        super().__init__(position)
        self.chunk, K, V = config.chunk, config.key_dim, int(d_model * config.expand_value)
        self.heads = 1
        self.cache = KeyValueCache(1, K, V, config.chunk)
        self.sizes = (K, V, d_model, d_model)
        self.average = MovingAverage(d_model, config.averages)
        self.value = linear(d_model, V, "value")
        self.inner = linear(d_model, sum(self.sizes), "inner")  # z, gamma, phi, h
        self.mix = linear(V, d_model, "mix")
        self.value_bias = nn.Parameter(torch.empty(V))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes)))
        self.scales = nn.Parameter(torch.empty(2, K))  # of queries and keys
        self.shifts = nn.Parameter(torch.empty(2, K))

    def init_weights(self) -> None:
        for bias in (self.bias, self.value_bias, self.shifts):
            nn.init.zeros_(bias)
        nn.init.ones_(self.scales)

    def groups(self, ctx: Ctx) -> LengthBuckets | None:
        size = self.chunk
        if size is None:
            return super().groups(ctx)
        return ctx.cached_on_host(
            f"mega.chunks.{size}",
            lambda layout, mask: LengthBuckets.of(_chunks(layout, size), mask, in_place=True),
        )

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        cache, average = parts_of(state, 2)
        seen, average = self.average(x_BTD, ctx, average)
        read = self.inner(seen, ctx)
        z, gamma, phi, h = (read + self.bias.to(read.dtype)).split(self.sizes, dim=-1)
        v = self.value(x_BTD, ctx)
        v = F.silu(v + self.value_bias.to(v.dtype))[:, :, None]
        z = F.silu(z)[:, :, None, None]
        q, k = (z * self.scales.to(z.dtype) + self.shifts.to(z.dtype)).unbind(3)
        parts = *self.position.rotate_call(ctx, q, k), v
        if state is None:
            o = self._forward_full(parts, ctx)
        else:
            o, cache = self._forward_cached(parts, ctx, cache)
        moved = F.silu(h + self.mix(F.silu(gamma) * o.flatten(2), ctx))
        y = torch.lerp(x_BTD, moved.to(x_BTD.dtype), phi.sigmoid().to(x_BTD.dtype))
        return Out(y, join_parts(cache, average))

    def mask(self, ctx: Ctx) -> Mask:
        return ctx.mask if self.chunk is None else ctx.mask & SameChunk(self.chunk)


def _chunks(layout: Layout, size: int) -> Layout:
    return cut_chunks(layout.on_host(), size).to(layout.fields.document.device)


def cut_chunks(layout: Layout, size: int) -> Layout:
    """Chunks of ``size`` tokens of every document as documents of their own, without slots."""
    f = layout.fields
    document, time = f.document.reshape(-1).long(), f.position[..., 0].reshape(-1) // size
    moved = (document[1:] != document[:-1]) | (time[1:] != time[:-1])
    start = F.pad(moved, (1, 0), value=True) & (document > 0)
    number = start.cumsum(0) * (document > 0)
    first = F.pad(start.nonzero()[:, 0], (0, 1), value=len(document)).to(torch.int32)
    fields = f._replace(document=number.view(f.document.shape).to(torch.int32))
    slot = torch.full((len(first) - 1,), -1, dtype=torch.int32, device=first.device)
    return replace(
        layout,
        fields=fields,
        cu_seqlens=first,
        slot=slot,
        fresh=torch.ones_like(slot, dtype=torch.bool),
        max_seqlen=size,
        aligned=False,
    )


@MIXERS.register("mega")
class MegaConfig(LayerConfig):
    """Moving-average equipped gated attention, one head, optionally within chunks."""

    kind: Literal["mega"] = "mega"
    averages: Annotated[int, Field(gt=0, description="moving averages of a channel")] = 16
    key_dim: Annotated[int, Field(gt=0, description="of queries and keys")] = 64
    expand_value: Annotated[float, Field(gt=0, description="value width / d_model")] = 2.0
    chunk: Annotated[int, Field(gt=0, description="tokens that attend to each other")] | None = None
    position: PositionField = Field(default="rope", validate_default=True)

    layer = Mega
    small = {"averages": 3, "key_dim": 4, "expand_value": 0.5}
