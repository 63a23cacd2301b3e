"""Attention as a recurrence.

B rows, T tokens, D model, H heads, V value width, R rows of one document, L their length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.linear_attention.memory import ScaledSums
from mm.registry import MIXERS
from mm.state import State


class Aaren(Mixer):
    """Causal softmax attention of ONE learned query a head.

    ``o_t = sum_{i <= t} e^{s_i} v_i / sum_{i <= t} e^{s_i}`` with ``s_i = q . k_i``.
    The state is the largest score so far m, and the weights' and values' sums in units of ``e^m``;
    both are first-order recurrences with decay ``e^{m_{t-1} - m_t}``, whose exponents are <= 0.

    Source: Feng et al. 2024 (arXiv:2405.13956), sections 3.1-3.3 and figure 4.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: AarenConfig, linear: LinearFactory):
        super().__init__()
        heads = config.heads
        self.heads, self.width = heads, d_model // heads
        self.kv = linear(d_model, 2 * d_model, "kv")
        self.query = nn.Parameter(torch.empty(heads, self.width))
        self.out = linear(d_model, d_model, "out")
        self.sums = ScaledSums(heads, heads * (2 + self.width))

    def init_weights(self) -> None:
        nn.init.normal_(self.query)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        H, V = self.heads, self.width
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        k, v = self.kv(x_BTD, ctx).to(wide).chunk(2, -1)
        score = torch.einsum("bthv,hv->bth", k.unflatten(-1, (H, V)), self.query.to(wide))
        score = score * V**-0.5
        spread = lambda unit: torch.cat((unit, unit.repeat_interleave(V, -1)), -1)
        o, after = self.sums(self._average, (score, v), ctx, state, spread)
        return Out(self.out(o.to(x_BTD.dtype), ctx), after)

    def _average(self, score: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, D)` and `(R, L, H + H + D)` m and sums of weights and values."""
        H = self.heads
        # Outputs do not depend on the unit m: no gradient goes through it.
        first, top = before[:, None, :H].detach(), score.detach()
        m = torch.cat((first, top), 1).cummax(1)[0]
        keep = torch.where(m[:, :-1] == m[:, 1:], 0.0, m[:, :-1] - m[:, 1:]).exp()
        weight = (score - m[:, 1:]).exp()
        spread = lambda t: t.repeat_interleave(self.width, -1)
        sums, _ = linear_scan(
            torch.cat((keep, spread(keep)), -1),
            torch.cat((weight, spread(weight) * v), -1),
            None,
            before[:, H:].contiguous(),
        )
        return sums[..., H:] / spread(sums[..., :H]), torch.cat((m[:, 1:], sums), -1)


@MIXERS.register("aaren")
class AarenConfig(EvenHeadsConfig):
    """Softmax attention of a learned query, with a state of constant size."""

    kind: Literal["aaren"] = "aaren"

    layer = Aaren
