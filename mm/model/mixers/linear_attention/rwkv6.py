"""RWKV-6 time mixing.

B rows, T tokens, D model, H heads, K width of a head, R rows of one document, L their length, P = 5
mixtures of a token and the one before it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels import device
from mm.kernels.linear_attention import linear_attention
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.conv.state import TokenTail
from mm.model.mixers.linear_attention.memory import MatrixMemory
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of

RECEPTANCE, KEY, VALUE, GATE, DECAY = range(5)


class RWKV6(Mixer):
    """``o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)``, ``S_t = diag(w_t) S_{t-1} + k_t v_t^T``.

    ``w = exp(-exp(d))``; then a norm by head, a swish gate and the output projection.
    Receptance r, key, value, gate and d read the token mixed with the one before it, each in shares
    that a small network finds (ddlerp). The recurrence is `linear_attention` one step late: its
    queries read the state before the token, and the bonus u adds the token itself.

    Source: Peng et al. 2024, Eagle and Finch (arXiv:2404.05892), section 4.2, eq. 14-19.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: RWKV6Config, linear: LinearFactory):
        super().__init__()
        self.config, self.heads, D = config, config.heads, d_model
        low = config.mix_rank
        self.mix_base = nn.Parameter(torch.empty(D))
        self.mix = nn.Parameter(torch.empty(5, D))
        self.mix_in = linear(D, 5 * low, "mix_in")
        self.mix_out = nn.Parameter(torch.empty(5, low, D))
        self.projections = nn.ModuleList(
            linear(D, D, name) for name in ("receptance", "key", "value", "gate")
        )
        self.decay_in = linear(D, config.decay_rank, "decay_in")
        self.decay_out = nn.Parameter(torch.empty(config.decay_rank, D))
        self.decay = nn.Parameter(torch.empty(D))
        self.bonus = nn.Parameter(torch.empty(D))
        self.norm_weight = nn.Parameter(torch.empty(D))
        self.norm_bias = nn.Parameter(torch.empty(D))
        self.out = linear(D, D, "out")
        self.shift, K = TokenTail(D, 1), D // self.heads
        self.memory = MatrixMemory(self.heads, K, K, late=True)

    def init_weights(self) -> None:
        nn.init.uniform_(self.mix_base, 0, 1)
        nn.init.uniform_(self.mix, 0, 1)
        # Small: mixtures and decays begin as those of the plain vectors.
        nn.init.uniform_(self.mix_out, -1e-2, 1e-2)
        nn.init.uniform_(self.decay_out, -1e-2, 1e-2)
        with torch.no_grad():
            h = torch.arange(len(self.decay), dtype=torch.float32) / max(1, len(self.decay) - 1)
            self.decay.copy_(-6 + 5 * h**0.9)
            self.bonus.copy_(0.5 * (1 - h))
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, memory = parts_of(state, 2)
        (x, previous), tail = self.shift(x_BTD, ctx, tail)
        r, k, v, g, gate = self._features(x, previous, ctx)
        o, memory = self.memory(late_attention, (r, k, v, g), ctx, memory)
        return Out(self.out(self._finish(o, r, k, v, gate), ctx), join_parts(tail, memory))

    def _features(self, x: Tensor, previous: Tensor, ctx: Ctx) -> tuple[Tensor, ...]:
        """Receptance, key, value and log decay `(B, T, H, K)`, and the gate; decays are wide."""
        B, T, D = x.shape
        gap = previous - x
        low = torch.tanh(self.mix_in(x + gap * self.mix_base, ctx)).unflatten(
            -1, (5, self.config.mix_rank)
        )
        share = torch.einsum("btpi,pid->pbtd", low, self.mix_out) + self.mix[:, None, None]
        mixed = (x + gap * share).unbind(0)
        r, k, v, gate = (
            project(mixed[i], ctx)
            for i, project in zip((RECEPTANCE, KEY, VALUE, GATE), self.projections, strict=True)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = torch.tanh(self.decay_in(mixed[DECAY], ctx)) @ self.decay_out
        g = -torch.exp(raw.to(wide) + self.decay.to(wide))
        heads = lambda t: t.view(B, T, self.heads, D // self.heads)
        r, k, v = (t.to(device.product_dtype(t)) for t in (r, k, v))
        return heads(r), heads(k), heads(v), heads(g), gate

    def _finish(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Bonus, norm by head and gate: `(B, T, D)`."""
        u = self.bonus.to(o).view(self.heads, -1)
        o = o + (r * u * k).sum(-1, keepdim=True) * v
        # Heads are groups of 64 channels in the paper, whose epsilon grows with them.
        o = F.layer_norm(o, o.shape[-1:], eps=1e-5 * self.heads).flatten(2)
        o = o * self.norm_weight.to(o) + self.norm_bias.to(o)
        return F.silu(gate) * o.to(gate.dtype)


def late_attention(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_attention` whose queries read the state before their token.

    Args:
        r, k, v, g: `(R, L, H, K)`.
        S: `(R, H, K, K)` before the first token; None = zeros, and the last state is of no use.
    """
    late = [F.pad(t, (0, 0, 0, 0, 1, 0)) for t in (k, v, g)]
    if S is None:
        return linear_attention(r, *(t[:, :-1] for t in late))
    # One token more: the state after the last token is that before a token to come.
    o, last = linear_attention(F.pad(r, (0, 0, 0, 0, 0, 1)), *late, S)
    return o[:, :-1], last


@MIXERS.register("rwkv6")
class RWKV6Config(EvenHeadsConfig):
    """RWKV-6: decays by channel and token, token shift, a bonus for the token itself."""

    kind: Literal["rwkv6"] = "rwkv6"
    mix_rank: Annotated[int, Field(gt=0, description="of the network that mixes two tokens")] = 32
    decay_rank: Annotated[int, Field(gt=0, description="of the decay's projection")] = 64

    layer = RWKV6
    small = {"heads": 2, "mix_rank": 2, "decay_rank": 2}
