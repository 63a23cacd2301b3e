"""Linear attention whose state has a bounded norm.

B rows, T tokens, D model, H heads, K key width, V value width, R rows of one document, L their
length, C tokens of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.kernels.linear_attention import linear_attention
from mm.kernels.op import exact
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.linear_attention import (
    SMALL_SCALAR,
    require_head_decay,
)
from mm.model.varlen import pieces
from mm.registry import MIXERS, MixerField
from mm.state import State, join_parts, parts_of

CHUNK = 64


@exact
def shrinkage(k: Tensor, v: Tensor, g: Tensor, S: Tensor, real: Tensor, cap: float) -> Tensor:
    """`(R, C, H)` factor in (0, 1] by which each token of a chunk shrinks the state after it.

    A factor a head makes the state a weighted sum of ``k_s v_s^T`` and of ``S``, whose norm needs
    their scalar products alone: the loop over tokens carries weights, not matrices.

    Args:
        k: `(R, C, H, K)`; v: `(R, C, H, V)`; g: `(R, C, H)` log decays.
        S: `(R, H, K, V)` state before the chunk.
        real: `(R, C, 1)` bool, tokens that count.
    """
    k, v = (x.to(S.dtype) for x in (k, v))
    like = torch.einsum("rlhk,rmhk->rlmh", k, k) * torch.einsum("rlhv,rmhv->rlmh", v, v)
    old = torch.einsum("rlhk,rhkv,rlhv->rlh", k, S, v)
    square = S.square().sum((-1, -2))
    weights = torch.ones_like(square)[:, None]  # (R, 1 + t, H): of S, then of tokens before t
    factors = []
    # A column of scalar products: with S first, then with each token.
    columns = torch.cat((old[:, None], like), 1).unbind(2)
    for t, (a, column) in enumerate(zip(g.exp().unbind(1), columns, strict=True)):
        across = (weights * column[:, : 1 + t]).sum(1)
        grown = a * a * square + 2 * a * across + column[:, 1 + t]
        factor = torch.where(real[:, t], cap * grown.clamp_min(cap * cap).rsqrt(), 1.0)
        square = grown * factor.square()
        weights = torch.cat((weights * (a * factor)[:, None], factor[:, None]), 1)
        factors.append(factor)
    return torch.stack(factors, 1)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, g: Tensor, S: Tensor | None = None, *, cap: float
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of ``S_t = s_t (a_t S_{t-1} + k_t v_t^T)`` with ``|S_t| <= cap``.

    The factor ``s_t <= 1`` bounds the Frobenius norm.

    Args:
        q: `(R, L, H, K)`; k, v, g as in `shrinkage`.
        real: `(R, L, 1)`, 0 where a token does not count; its k, v and g are zeros.
        S: `(R, H, K, V)` before; None = zeros.
    Returns:
        `(R, L, H, V)` and `(R, H, K, V)`.
    """
    (R, _, H, K), V = k.shape, v.shape[-1]
    wide = torch.promote_types(k.dtype, torch.float32)
    before = k.new_zeros(R, H, K, V, dtype=wide) if S is None else S
    done = []
    for qc, kc, vc, gc, counts in pieces(CHUNK, q, k, v, g, real):
        factor = shrinkage(kc, vc, gc, before, counts > 0, cap)
        decayed, written = gc + factor.log(), (vc * factor[..., None]).to(vc.dtype)
        o, before = linear_attention(qc, kc, written, decayed, before)
        done.append(o)
    return torch.cat(done, 1) if done else torch.zeros_like(v, dtype=wide), before


class CappedState(Mixer):
    """``S_t = S'_t min(1, c / |S'_t|)`` by head, ``S'_t = a_t S_{t-1} + k_t v_t^T``.

    The state of a text of any length is no larger than those that training saw. Wraps a
    `linear_attention` with decays by head, as Mamba-2 is. A token's factor needs the state before
    it, so tokens wait for each other; all but their scalar factors is computed in chunks.

    Source: Chen et al. 2024, Stuffed Mamba (arXiv:2410.07145v1), its mitigation by state
    normalisation.
    """

    caps = Caps(causal=True, step=True, sequential=True)

    def __init__(self, d_model: int, config: CappedStateConfig, linear: LinearFactory):
        super().__init__()
        self.inner = require_head_decay(config.inner, "capped_state").build(d_model, linear)
        self.cap = config.cap

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, memory = parts_of(state, 2)
        f, tail = self.inner.features(x_BTD, ctx, tail)
        q, k, v = f["q"], f["k"], f["v"]
        g = f.get("g", self.inner.memory.zeros(1)).expand(q.shape[:3])
        op = partial(capped_attention, cap=self.cap)
        parts = (q, k, v, torch.ones_like(g[..., :1]), g)
        o, memory = self.inner.memory(op, parts, ctx, memory)
        return Out(self.inner.finish(o, x_BTD, f, ctx), join_parts(tail, memory))


@MIXERS.register("capped_state")
class CappedStateConfig(LayerConfig):
    """Linear attention whose state has a bounded norm."""

    kind: Literal["capped_state"] = "capped_state"
    inner: MixerField = Field(default="linear_attention", validate_default=True)
    cap: float = Field(
        default=10.0, gt=0, description="Frobenius norm of a head's state; the largest in training"
    )

    layer = CappedState
    small = {"inner": SMALL_SCALAR, "cap": 0.5}
