"""The forget gate of attention.

B rows, T tokens, D model, H heads, N slots, R rows of one document, L their length, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.kernels.attention.spec import ScoreSpec
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.kv_cache import KV, KeyValueCache
from mm.model.varlen import PackedRows
from mm.state import State


class ForgetGate(nn.Module):
    """``log f``, ``f = sigmoid(w x + b)``, one a head: `forget_bias` fades what lies behind it.

    Args:
        reach: how many of the last tokens are kept in its cache; default all.
    Source: Lin et al. 2025, Forgetting Transformer (arXiv:2503.02130), eq. 5-8.
    """

    def __init__(self, d_model: int, heads: int, linear: LinearFactory, reach: int | None = None):
        super().__init__()
        # Its keys are the sums of the log gates up to each token.
        self.cache = KeyValueCache(heads, 1, 0, reach, wide=True)
        self.gate = linear(d_model, heads, "forget")
        self.bias = nn.Parameter(torch.empty(heads))

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """`(B, T, H)` log gates, not positive, float32 or wider."""
        z = self.gate(x_BTD, ctx)
        wide = torch.promote_types(z.dtype, torch.float32)
        return F.logsigmoid(z.to(wide) + self.bias.to(wide))

    def extend(
        self, log_BTH: Tensor, ctx: Ctx, state: State, copy: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        """Sums of log gates since the document's start, and the State after the call.

        Args:
            copy: as of `KeyValueCache`.
        Returns:
            those of the call `(R, L, H)`, and of the keys that it may look at `(R, S, H)`.
        """
        state = state.commit()
        assert isinstance(state, KV)
        H = log_BTH.shape[2]
        docs = PackedRows.of(ctx.layout, state.count.shape[0])
        last = ((state.count - 1).clamp_min(0) % state.k.shape[2])[:, None, None, None]
        before = state.k.gather(2, last.expand(-1, H, 1, 1))[:, :, 0, 0]
        before = docs.read(torch.where((state.count > 0)[:, None], before, 0.0))
        faded = before[:, None].to(log_BTH.dtype) + docs.unpack(log_BTH).cumsum(1)
        packed = docs.pack(faded)[..., None]
        seen, after = self.cache(packed, packed[..., :0], ctx, state, copy=copy)
        return faded, seen.k[..., 0], after


def forget_bias(faded_RTH: Tensor, faded_RSH: Tensor) -> Tensor:
    """`(R, H, T, S)` sums of the log gates between query and key, from those since the start.

    To keys before the query it is the paper's ``c_i - c_j``; to keys after it (a mask that is not
    causal) the same sum, which fades both ways.
    """
    q, k = faded_RTH.transpose(1, 2), faded_RSH.transpose(1, 2)
    return -(q[..., :, None] - k[..., None, :]).abs()


def sums_since_start(log_RTH: Tensor, document_RT: Tensor | None) -> Tensor:
    """Sums of the log gates since the start of the document, or of the row where it holds one."""
    if document_RT is None:
        return log_RTH.cumsum(1)
    # float64: those of a whole row, less what they were when the document began.
    wide = log_RTH.double()
    total = wide.cumsum(1)
    begins = F.pad(document_RT[:, 1:] != document_RT[:, :-1], (1, 0), value=True)
    # They fall, so the least of the values at borders is that of the last border.
    before = (total - wide).detach().masked_fill(~begins[..., None], torch.inf).cummin(1).values
    return (total - before).to(log_RTH.dtype)


def add_fade(score: ScoreSpec, faded_RTH: Tensor, faded_RSH: Tensor) -> ScoreSpec:
    """Scores that forget gates fade, besides what they were."""
    if score.fade_RTH is None:
        return score._replace(fade_RTH=faded_RTH, fade_RSH=faded_RSH)
    # Two distances do not add up to one.
    bias, other = forget_bias(faded_RTH, faded_RSH), score.bias_RHTS
    return score._replace(bias_RHTS=bias if other is None else bias + other)
