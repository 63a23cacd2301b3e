"""Linear attention whose state forgets exactly what left a window.

B rows, T tokens, D model, H heads, K key width, V value width, N slots, R rows of one document, L
their length, P tokens of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.linear_attention import (
    SMALL_SCALAR,
    require_head_decay,
)
from mm.model.stateful import Stateful, StatePart
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS, MixerField
from mm.state import DataclassState, State, join_parts, parts_of


@dataclass(frozen=True)
class Windowed(DataclassState):
    """What the window sums up, and its tokens."""

    S: Tensor  # (N, H, K, V) float32 or wider
    k: Tensor  # (N, P, H, K)
    v: Tensor  # (N, P, H, V)
    g: Tensor  # (N, P, H)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None = None, n: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of the sum of the last P tokens' ``k v^T``, decayed.

    ``S_t = a_t S_{t-1} + k_t v_t^T - (a_{t-P+1} .. a_t) k_{t-P} v_{t-P}^T``.

    Args:
        q: `(R, L, H, K)`.
        k: `(R, P + L, H, K)` with the window before the call; v, g alike.
        S: `(R, H, K, V)` before; None = zeros.
        n: `(R,)` tokens of each row that count; None = L.
    Returns:
        `(R, L, H, V)` and `(R, H, K, V)`.
    """
    L = q.shape[1]
    P = k.shape[1] - L
    total = g.double().cumsum(1)
    # Of what left, what P steps of decay have made of it; a product of decays is not above 1.
    gone = -(total[:, P:] - total[:, :L]).clamp_max(0).exp().to(k)[..., None] * k[:, :L]
    new, old, now = (k[:, P:], v[:, P:]), (gone, v[:, :L]), g[:, P:]
    if n is not None:
        keep = torch.arange(L, device=k.device) < n[:, None]
        drop = lambda t: torch.where(keep.view(*keep.shape, *[1] * (t.dim() - 2)), t, 0)
        new, old, now = tuple(map(drop, new)), tuple(map(drop, old)), drop(now)
    o, after = linear_attention(q, *new, now, S)
    less, gone_after = linear_attention(q, *old, now)
    return o + less, after + gone_after


class WindowMemory(StatePart):
    """The matrix of each head that the last P tokens have summed up, and those tokens."""

    documents_apart = True

    def __init__(self, heads: int, key_dim: int, value_dim: int, window: int):
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.window = window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Windowed | None]:
        """Outputs `(B, T, H, V)` of every document, and the State after the call."""
        if state is None:
            return per_document(self._first, ctx, q, k, v, g), None
        assert isinstance(state, Windowed)
        docs = PackedRows.of(ctx.layout, state.S.shape[0])
        k, v, g = (
            torch.cat((docs.read(before), docs.unpack(t)), 1)
            for before, t in ((state.k, k), (state.v, v), (state.g, g))
        )
        o, S = windowed_attention(docs.unpack(q), k, v, g, docs.read(state.S), docs.length)
        # The window before the token at position P + length.
        index = docs.length[:, None] + torch.arange(self.window, device=k.device)
        row = torch.arange(len(k), device=k.device)[:, None]
        k, v, g = (t[row, index] for t in (k, v, g))
        return docs.pack(o), docs.write(state, S=S, k=k, v=v, g=g)

    def _first(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        before = (0, 0, 0, 0, self.window, 0)
        return windowed_attention(q, F.pad(k, before), F.pad(v, before), F.pad(g, before[2:]))[0]

    def initial_state(self, n: int, max_len: int) -> Windowed:
        P, H, K, V = self.window, self.heads, self.key_dim, self.value_dim
        return Windowed(*(self.zeros(n, *s) for s in ((H, K, V), (P, H, K), (P, H, V), (P, H))))


class WindowedState(Mixer):
    """``o_t = q_t (S_t - (a_{t-P+1} .. a_t) S_{t-P})``: the sum of the last P tokens.

    It is as if the recurrence had begun P tokens ago. The state cannot collapse on texts longer
    than training's. Wraps a `linear_attention` with decays by head, as Mamba-2 is.

    Source: Chen et al. 2024, Stuffed Mamba (arXiv:2410.07145), section on mitigations: sliding
    window by state difference.
    """

    def __init__(self, d_model: int, config: WindowedStateConfig, linear: LinearFactory):
        super().__init__()
        self.inner = require_head_decay(config.inner, "windowed_state").build(d_model, linear)
        self.memory = WindowMemory(*self.inner.memory.shape, window=config.window)

    def stateful_parts(self) -> list[Stateful]:
        return [self.inner.conv, self.memory]

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, memory = parts_of(state, 2)
        f, tail = self.inner.features(x_BTD, ctx, tail)
        # A difference of two sums, each of which may be far larger: rounding them would show.
        q, k, v = (f[n].to(self.memory.wide) for n in "qkv")
        g = f.get("g", self.memory.zeros(1)).expand(q.shape[:3])
        o, memory = self.memory(q, k, v, g, ctx, memory)
        return Out(self.inner.finish(o, x_BTD, f, ctx), join_parts(tail, memory))


@MIXERS.register("windowed_state")
class WindowedStateConfig(LayerConfig):
    """Linear attention over the last ``window`` tokens, by the difference of two states."""

    kind: Literal["windowed_state"] = "windowed_state"
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    window: Annotated[int, Field(gt=0, description="tokens; no more than training saw")] = 1024

    layer = WindowedState
    small = {"inner": SMALL_SCALAR, "window": 3}
