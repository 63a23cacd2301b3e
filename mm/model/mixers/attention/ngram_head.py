"""n-gram heads.

B rows, T tokens, D model, N slots, R rows of one document, L their length, S keys, C cached ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.registry import MIXERS
from mm.state import State

TOKEN = "ngram.token"  # the extra field under which the cache keeps ids
UNKNOWN = -1  # the id of a token whose ids nobody gave: equal to none


def _rank(key_BT: Tensor) -> Tensor:
    """Equal numbers for equal keys of a row, 0 .. T - 1; shapes do not depend on values."""
    ordered, index = key_BT.sort(dim=1)
    new = F.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0))
    return torch.empty_like(index).scatter_(1, index, new.cumsum(1))


def _before(x_BT: Tensor, n: int) -> Tensor:
    """What stood ``n`` tokens before; the first ones get `UNKNOWN`."""
    return F.pad(x_BT, (n, 0), value=UNKNOWN)[:, : x_BT.shape[1]] if n else x_BT


def ngram_means(h_BTD: Tensor, token_BT: Tensor, document_BT: Tensor, n: int) -> Tensor:
    """Mean of ``h_j`` over what continued earlier copies of the last ``n - 1`` tokens.

    Those are the j up to t whose ``n - 1`` tokens before them are the last ``n - 1`` tokens up to
    t, in the same document; zeros where there are none. Sorted by what a token would continue,
    means are running sums: linear in T but for the sort.

    Args:
        h_BTD: `(B, T, D)` any float dtype; summed in float32 or wider.
        token_BT: `(B, T)` ids; negative ones equal none.
        document_BT: `(B, T)` documents, 0 = padding.
    Returns:
        `(B, T, D)` float32 or wider.
    """
    B, T, D = h_BTD.shape
    wide = torch.promote_types(h_BTD.dtype, torch.float32)
    if T == 0:
        return h_BTD.to(wide)
    document = document_BT.long()
    same = lambda k: _before(document, k) == document
    # A token is written under the n - 1 tokens before it, and reads under the last n - 1 tokens.
    code = document[:, :, None].expand(B, T, 2).reshape(B, 2 * T)
    valid = (document > 0)[:, :, None].expand(B, T, 2)
    for k in range(n - 1):
        written, read = _before(token_BT.long(), k + 1), _before(token_BT.long(), k)
        both = torch.stack((written, read), -1)
        inside = torch.stack((same(k + 1), same(k)), -1)
        valid = valid & inside & (both >= 0)
        code = _rank(_rank(code) * (2 * T) + _rank(both.reshape(B, 2 * T)))
    valid = valid.reshape(B, 2 * T)
    # What cannot match stands alone in a last group.
    code = torch.where(valid, code, 2 * T + document.max())
    order = code.argsort(dim=1, stable=True)
    grouped = code.gather(1, order)
    reset = F.pad(grouped[:, 1:] != grouped[:, :-1], (1, 0), value=True)
    ones = torch.cat((h_BTD.to(wide), h_BTD.new_ones(B, T, 1, dtype=wide)), -1)
    values = torch.stack((ones, torch.zeros_like(ones)), 2).flatten(1, 2)  # written, then read
    values = values.masked_fill(~valid[..., None], 0)
    index = order[..., None].expand(-1, -1, D + 1)
    sums, _ = linear_scan(torch.ones_like(values), values.gather(1, index), reset)
    rank = torch.arange(2 * T, device=order.device).expand(B, -1)
    back = torch.empty_like(order).scatter_(1, order, rank)
    found = sums.gather(1, back[:, 1::2, None].expand(-1, -1, D + 1))
    found = found.masked_fill(~valid[:, 1::2, None], 0)
    return found[..., :-1] / found[..., -1:].clamp_min(1)


class NgramHead(Mixer):
    """``W_1 x_t + W_2 mean x_j`` over what continued an earlier copy of the last ``n - 1`` tokens.

    It is attention that nothing has to learn. Tokens are the first stream of ids; a call without
    ids has tokens that equal none.

    Source: Akyurek et al. 2024, In-Context Language Learning (arXiv:2401.12973), section 6.
    """

    caps = Caps(causal=True, step=True, reads=frozenset({"ids"}))
    replays = False

    def __init__(self, d_model: int, config: NgramHeadConfig, linear: LinearFactory):
        super().__init__()
        self.d_model, self.n = d_model, config.n
        self.cache = KeyValueCache(1, 0, d_model, extra=(TOKEN,))
        self.own = linear(d_model, d_model, "own")
        self.out = linear(d_model, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        document = ctx.layout.fields.document
        if ctx.ids is None:
            token = torch.full_like(document, UNKNOWN)
        else:
            token = ctx.ids[..., 0].to(document.dtype)
        after: State | None = None
        if state is None:
            mean = ngram_means(x_BTD, token, document, self.n)
        else:
            mean, after = self._forward_cached(x_BTD, token, ctx, state)
        return Out(self.own(x_BTD, ctx) + self.out(mean.to(x_BTD.dtype), ctx), after)

    def _forward_cached(
        self, x: Tensor, token: Tensor, ctx: Ctx, state: State
    ) -> tuple[Tensor, State]:
        f = ctx.layout.fields
        f = f._replace(extra={**f.extra, TOKEN: token})
        x = x[:, :, None]
        seen, after = self.cache(x[..., :0], x, ctx, state, f)
        docs, known, count = seen.docs, seen.known, seen.begin[:, None].long()
        (R, S), C = known.document.shape, seen.cached
        # Move the call's tokens up to the cached ones, so that neighbours are neighbours.
        number = torch.arange(S, device=x.device).expand(R, -1)
        index = number
        if S > C:
            index = torch.where(number < count, number, number - count + C).clamp_max(S - 1)
        there = (number < count + docs.length[:, None]) & (known.document.gather(1, index) > 0)
        tokens = torch.where(there, known.extra[TOKEN].gather(1, index), UNKNOWN)
        values = seen.v[:, :, 0].gather(1, index[..., None].expand(-1, -1, self.d_model))
        at = seen.query_index()
        match = (at[..., None] >= number[:, None]) & there[:, None]
        for k in range(self.n - 1):
            read = _before(tokens, k).gather(1, at.clamp_max(S - 1))
            match = match & (read[..., None] == _before(tokens, k + 1)[:, None])
            match = match & (read >= 0)[..., None]
        wide = torch.promote_types(x.dtype, torch.float32)
        # What no token of the row sees may hold anything.
        values = values.to(wide).masked_fill(~there[..., None], 0)
        mean = match.to(wide) @ values / match.sum(-1, keepdim=True).clamp_min(1)
        return docs.pack(mean), after


@MIXERS.register("ngram_head")
class NgramHeadConfig(LayerConfig):
    """Attention to what followed earlier copies of the last tokens."""

    kind: Literal["ngram_head"] = "ngram_head"
    n: Annotated[int, Field(ge=1, description="the last n - 1 tokens must match")] = 2

    layer = NgramHead
