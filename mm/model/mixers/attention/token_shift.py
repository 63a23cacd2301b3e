"""The token shift of keys and values.

B rows, T tokens, D model, G key heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.conv.state import TokenTail
from mm.state import State


class TokenShift(nn.Module):
    """``a_t k_{t-1} + (1 - a_t) k_t`` with ``a_t = sigmoid(w x_t)``, one a head; and so values.

    Values have gates of their own; before a document is nothing.

    Source: Lin et al. 2025, Forgetting Transformer (arXiv:2503.02130), the Pro block.
    """

    def __init__(self, d_model: int, kv_heads: int, head_dim: int, linear: LinearFactory):
        super().__init__()
        self.gates = linear(d_model, 2 * kv_heads, "token_shift")  # of keys, then of values
        self.tail = TokenTail(2 * kv_heads * head_dim, 1)

    def forward(
        self, x_BTD: Tensor, kv_BTGK: Tensor, ctx: Ctx, tail: State | None
    ) -> tuple[Tensor, State | None]:
        """Shifted keys and values `(B, T, 2 G, K)`, and the State after the call."""
        z = self.gates(x_BTD, ctx)
        a = z.to(torch.promote_types(z.dtype, torch.float32)).sigmoid()[..., None]
        (own, before), after = self.tail(kv_BTGK.flatten(2), ctx, tail)
        own, before = own.view_as(kv_BTGK), before.view_as(kv_BTGK)
        return (a * before + (1 - a) * own).to(kv_BTGK.dtype), after
