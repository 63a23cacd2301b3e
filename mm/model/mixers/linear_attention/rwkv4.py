"""RWKV-4 time mixing.

B rows, T tokens, D model, R rows of one document, L their length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import TokenTail
from mm.model.mixers.linear_attention.memory import ScaledSums
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of


class RWKV4(Mixer):
    """``out(sigmoid(r_t) * wkv_t)``; ``wkv_t`` is an average of all values so far, by channel.

    Its weights are ``exp(k_i - (t - 1 - i) w)``, the token's own ``exp(u + k_t)``.
    Receptance r, key and value read the token mixed with the one before it. Sums are kept in units
    of ``exp(m_t)``, m the largest exponent so far: no exponent is positive, and as quotients do not
    depend on m no gradient goes through it.

    Source: Peng et al. 2023 (arXiv:2305.13048), section 3.1.2, eq. 11 to 17, in the stable form of
    its appendix D.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: RWKV4Config, linear: LinearFactory):
        super().__init__()
        D = d_model
        self.mix = nn.Parameter(torch.empty(3, D))
        names = ("receptance", "key", "value")
        self.projections = nn.ModuleList(linear(D, D, name) for name in names)
        self.log_decay = nn.Parameter(torch.empty(D))
        self.bonus = nn.Parameter(torch.empty(D))
        self.out = linear(D, D, "out")
        self.shift, self.sums = TokenTail(D, 1), ScaledSums(D, 3 * D)

    def init_weights(self) -> None:
        nn.init.uniform_(self.mix, 0, 1)
        with torch.no_grad():
            # Appendix E of the paper, for a layer in the middle of the stack.
            h = torch.arange(len(self.bonus), dtype=torch.float32) / max(1, len(self.bonus) - 1)
            self.log_decay.copy_(-5 + 8 * h**1.35)
            self.bonus.copy_(0.5 * ((torch.arange(len(self.bonus)) + 1) % 3 - 1) - 1.2)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, sums = parts_of(state, 2)
        (x, before), tail = self.shift(x_BTD, ctx, tail)
        gap = before - x
        r, k, v = (
            project(x + gap * (1 - self.mix[i]), ctx) for i, project in enumerate(self.projections)
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        k, v = k.to(wide), v.to(wide)
        spread = lambda unit: torch.cat((unit, unit), -1)
        fall = lambda: k.shape[1] * self.log_decay.to(wide).exp()
        o, sums = self.sums(self._average, (k, v), ctx, sums, spread, fall)
        return Out(self.out(r.sigmoid() * o.to(r.dtype), ctx), join_parts(tail, sums))

    def _average(self, k: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Averages `(R, L, D)` and `(R, L, 3 * D)` m and sums of values and weights."""
        if not k.shape[1]:
            return k, k.new_zeros(*k.shape[:2], before.shape[1])
        m0, sums0 = before[:, None].split((k.shape[2], 2 * k.shape[2]), dim=2)
        speed = self.log_decay.to(k).exp()
        with torch.no_grad():
            # m_t = max(m_0 - t w, max_{i <= t} k_i - (t - i) w). Float64: t w grows with length.
            fall = speed.double() * torch.arange(1, k.shape[1] + 1, device=k.device)[:, None]
            top = torch.cat((m0.double(), k.double() + fall), 1).cummax(1).values
            m = torch.cat((m0.double(), top[:, 1:] - fall), 1)
            lost, m = (m[:, :-1] - m[:, 1:]).to(k), m.to(k)
        keep, weight = (lost - speed).exp(), (k - m[:, 1:]).exp()
        sums, _ = linear_scan(
            torch.cat((keep, keep), -1),
            torch.cat((weight * v, weight), -1),
            None,
            sums0[:, 0].contiguous(),
        )
        values, weights = torch.cat((sums0, sums[:, :-1]), 1).chunk(2, dim=-1)
        own = self.bonus.to(k) + k
        unit = torch.maximum(m[:, :-1], own).detach()
        past, now = (m[:, :-1] - unit).exp(), (own - unit).exp()
        o = (past * values + now * v) / (past * weights + now)
        return o, torch.cat((m[:, 1:], sums), -1)


@MIXERS.register("rwkv4")
class RWKV4Config(LayerConfig):
    """RWKV-4: a decaying average of values by channel, with a bonus for the token itself."""

    kind: Literal["rwkv4"] = "rwkv4"

    layer = RWKV4
