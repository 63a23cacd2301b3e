"""Cached keys and values, with the Fields that they came from.

B rows, T tokens, N slots, G key heads, C cached tokens, K key width, V value width, R rows of one
document, L their length, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.layer import StatePart
from mm.model.varlen import PackedRows, merge_fields, refuse_overflow
from mm.state import DataclassState, State


@dataclass(frozen=True)
class KV(DataclassState):
    """Keys and values of the last C tokens of each slot; token i of a slot lies at ``i % C``."""

    k: Tensor  # (N, G, C, K) after rotation
    v: Tensor  # (N, G, C, V)
    fields: Fields  # (N, C): `document` is 1 where something is stored, else 0
    count: Tensor  # (N,) int64 tokens seen
    ring: bool  # old tokens may be overwritten (bounded reach); else C is the longest document

    def holds_call(self, docs: PackedRows, L: int) -> bool:
        """Whether rows may read the cache with this call already in it.

        Each row has a slot of its own, and nothing that a token still sees is overwritten: a ring
        loses, to one token, only what is out of reach.
        """
        return (L == 1 or not self.ring) and docs.own_slots()

    def contents(self) -> tuple[Tensor, Tensor, Fields]:
        """Keys `(N, C, G, K)`, values and Fields of all slots, cut to the fullest one."""
        C = self.k.shape[2]
        if self.k.device.type == "cpu":  # elsewhere the longest count would cost a synchronisation
            C = min(C, int(self.count.max()))
        return (
            self.k[:, :, :C].transpose(1, 2),
            self.v[:, :, :C].transpose(1, 2),
            self.fields.map(lambda t: t[:, :C]),
        )

    def past(self, docs: PackedRows, f: Fields) -> tuple[Tensor, Tensor, Fields]:
        """Keys `(R, G, C, K)`, values and Fields `(R, C)` that each row may look back at."""
        return docs.read(self.k), docs.read(self.v), self._shaped_like(f).fields.map(docs.read)

    def append(
        self,
        k_NLGK: Tensor,
        v_NLGV: Tensor,
        f: Fields,
        length_N: Tensor,
        fresh_N: Tensor,
        some_fresh: bool,
    ) -> KV:
        """Store the first ``length_N`` tokens of each slot's row; a fresh slot is emptied first.

        ``some_fresh``: whether there may be fresh slots at all, as the host knows.

        Raises:
            ValueError: a document outgrows ``max_len`` of `initial_state`.
        """
        C, L = self.k.shape[2], k_NLGK.shape[1]
        base = self._shaped_like(f)
        in_place = not torch.is_grad_enabled()
        count = torch.where(fresh_N, 0, base.count)
        if not self.ring:
            refuse_overflow(count + length_N > C, C)
        if some_fresh and _any(fresh_N & (base.count > 0)):
            base = base.map(lambda t: t.masked_fill(fresh_N.view(-1, *[1] * (t.dim() - 1)), 0))
        if L == 0:
            return replace(base, count=count)
        if L > C or L * 4 > C:
            # Pull: for each cache entry, the latest of the new tokens that lands there, if any.
            at = torch.arange(C, device=count.device)
            last = (count + length_N - 1)[:, None]
            # Index among the new tokens; negative: an old one stays.
            token = last - (last - at) % C - count[:, None]
            new = (token >= 0) & (length_N > 0)[:, None]
            token = token.clamp(0, L - 1)
            put = lambda old, x: _blend(old, x.movedim(1, -2) if x.dim() == 4 else x, token, new)
        else:
            j = torch.arange(L, device=count.device)
            to, valid = (count[:, None] + j) % C, j < length_N[:, None]
            put = lambda old, x: _scatter(
                old, x.movedim(1, -2) if x.dim() == 4 else x, to, valid, in_place
            )
        return KV(
            put(base.k, k_NLGK),
            put(base.v, v_NLGV),
            merge_fields(put, base.fields, f),
            count + length_N,
            self.ring,
        )

    def extend(
        self, k_RLGK: Tensor, v_RLGV: Tensor, f: Fields, docs: PackedRows, draft: bool = False
    ) -> KV | DraftKV:
        """State after a call whose rows are ``docs``."""
        w = docs.slot_writes()
        k, v = w.take(k_RLGK).to(self.k.dtype), w.take(v_RLGV).to(self.v.dtype)
        fields = f.map(w.take)
        if draft:
            return DraftKV(self, k, v, fields, w.length, w.fresh, docs.some_fresh())
        return self.append(k, v, fields, w.length, w.fresh, docs.some_fresh())

    def _shaped_like(self, f: Fields) -> KV:
        """Grow position axes and extra fields to those of the call: no State knows them before."""
        mine = self.fields
        axes = f.position.shape[-1] - mine.position.shape[-1]
        missing = [name for name in f.extra if name not in mine.extra]
        if not axes and not missing:
            return self
        extra = {**mine.extra, **{name: torch.zeros_like(mine.document) for name in missing}}
        position = torch.nn.functional.pad(mine.position, (0, max(axes, 0)))
        return replace(self, fields=mine._replace(position=position, extra=extra))


@dataclass(frozen=True)
class DraftKV(DataclassState):
    """A KV state with the tokens of a draft call not stored yet."""

    base: KV
    k: Tensor  # (N, L, G, K)
    v: Tensor
    fields: Fields
    length: Tensor  # (N,) tokens drafted
    fresh: Tensor  # (N,) bool
    some_fresh: bool

    def accept(self, n_N: Tensor) -> KV:
        n = torch.minimum(n_N.to(self.length), self.length)
        valid = torch.arange(self.k.shape[1], device=n.device) < n[:, None]
        fields = self.fields._replace(document=valid.to(torch.int32))
        return self.base.append(self.k, self.v, fields, n, self.fresh, self.some_fresh)

    def commit(self) -> KV:
        """Everything drafted counts."""
        return self.accept(self.length)


class VisibleKeys(NamedTuple):
    """A call in rows of one document, and the keys that they may look at: cached ones first."""

    docs: PackedRows
    fields: Fields  # (R, L) of the call
    k: Tensor  # (R, S, G, K)
    v: Tensor  # (R, S, G, V)
    known: Fields  # (R, S) of the keys
    begin: Tensor  # (R,) how many tokens of its document came before each row
    cached: int  # how many of the S lie in the cache, those of the call with them or not

    def query_index(self) -> Tensor:
        """`(R, L)` index of each token of the call in its document."""
        L = self.fields.document.shape[1]
        return self.begin[:, None] + torch.arange(L, device=self.begin.device)

    def key_index(self) -> Tensor:
        """`(R, S)` index of each key in its document, where the cache is no ring."""
        R, S = self.known.document.shape
        index = torch.arange(S, device=self.begin.device).expand(R, S)
        if S == self.cached:
            return index
        own = self.begin[:, None] + index[:, self.cached :] - self.cached
        return torch.cat((index[:, : self.cached], own), dim=1)


class KeyValueCache(StatePart):
    """Keeps keys and values of every document's tokens.

    Args:
        heads: G.
        key: K.
        value: V, perhaps 0.
        reach: how many of the last tokens are kept; default all.
        wide: store float32 or wider, under autocast too.
        extra: names of fields that are always there.
    """

    def __init__(
        self,
        heads: int,
        key: int,
        value: int,
        reach: int | None = None,
        wide: bool = False,
        extra: tuple[str, ...] = (),
    ):
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.reach, self.in_wide, self.extra = reach, wide, extra

    def forward(
        self,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        ctx: Ctx,
        state: State,
        fields: Fields | None = None,
        copy: bool = False,
    ) -> tuple[VisibleKeys, KV | DraftKV]:
        """Keys and values that the call may look at, and the State after it.

        Args:
            fields: of the call, where more is to be cached than the layout's.
            copy: return all that is cached and then the call's own, as `look_back` does.
        """
        state = state.commit()
        assert isinstance(state, KV)
        docs = PackedRows.of(ctx.layout, state.count.shape[0])
        k, v = docs.unpack(k_BTGK), docs.unpack(v_BTGV)
        if copy or ctx.draft or not state.holds_call(docs, k.shape[1]):
            seen = self.look_back(k_BTGK, v_BTGV, ctx, state, fields)
            # After that: it may write into the cache, of which the rows are a copy.
            return seen, state.extend(k, v, seen.fields, docs, ctx.draft)
        # Decoding's common case: stored first, then read where it lies, without a copy.
        f = docs.fields(ctx.layout.fields if fields is None else fields)
        begin = docs.read(state.count, 0)
        after = state.extend(k, v, f, docs)
        assert isinstance(after, KV)
        keys, values, known = after.contents()
        keys, values = keys.to(k_BTGK.dtype), values.to(v_BTGV.dtype)
        return VisibleKeys(docs, f, keys, values, known, begin, keys.shape[1]), after

    def look_back(
        self, k_BTGK: Tensor, v_BTGV: Tensor, ctx: Ctx, state: KV, fields: Fields | None = None
    ) -> VisibleKeys:
        """What `forward` returns, of a copy of the cache: nothing is stored."""
        docs = PackedRows.of(ctx.layout, state.count.shape[0])
        f = docs.fields(ctx.layout.fields if fields is None else fields)
        k, v = docs.unpack(k_BTGK), docs.unpack(v_BTGV)
        past_k, past_v, past_f = state.past(docs, f)
        return VisibleKeys(
            docs,
            f,
            torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1),
            torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1),
            merge_fields(lambda old, new: torch.cat((old, new), dim=1), past_f, f),
            docs.read(state.count, 0),
            past_k.shape[2],
        )

    def initial_state(self, n: int, max_len: int) -> KV:
        C, dtype = self._size(max_len), self._dtype()
        make = lambda *shape, dtype=torch.int32: self.like.new_zeros(*shape, dtype=dtype)
        return KV(
            make(n, self.heads, C, self.key, dtype=dtype),
            make(n, self.heads, C, self.value, dtype=dtype),
            Fields(make(n, C, 1), make(n, C), make(n, C), {x: make(n, C) for x in self.extra}),
            make(n, dtype=torch.long),
            ring=self.reach is not None and self.reach < max_len,
        )

    def _size(self, max_len: int) -> int:
        return max_len if self.reach is None else min(max_len, self.reach)

    def _dtype(self) -> torch.dtype:
        """What keys and values are stored in: autocast's dtype where that is on."""
        kind, dtype = self.like.device.type, self.like.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return torch.promote_types(dtype, torch.float32) if self.in_wide else dtype


def _any(t: Tensor) -> bool:
    """Whether any is true; an accelerator is not asked: there it may be."""
    return t.device.type != "cpu" or bool(t.any())


def _expand(index: Tensor, like: Tensor) -> Tensor:
    """`(N, L)` indices to the shape of `(N, [G,] L, [K])`."""
    if like.dim() == 4:
        return index[:, None, :, None].expand(
            like.shape[0], like.shape[1], index.shape[1], like.shape[3]
        )
    if like.dim() == 3:
        return index[:, :, None].expand(like.shape[0], index.shape[1], like.shape[2])
    return index


def _blend(old: Tensor, x: Tensor, token: Tensor, new: Tensor) -> Tensor:
    dim = 2 if old.dim() == 4 else 1
    return torch.where(_expand(new, old), x.gather(dim, _expand(token, x)).to(old.dtype), old)


def _scatter(old: Tensor, x: Tensor, to: Tensor, valid: Tensor, in_place: bool) -> Tensor:
    dim = 2 if old.dim() == 4 else 1
    index = _expand(to, old)
    # Invalid tokens write back what is there: their targets are distinct from all valid ones, since
    # L <= C.
    value = x.to(old.dtype)
    if _any(~valid):
        value = torch.where(_expand(valid, old), value, old.gather(dim, index))
    return old.scatter_(dim, index, value) if in_place else old.scatter(dim, index, value)
