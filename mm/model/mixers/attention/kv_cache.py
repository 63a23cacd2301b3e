"""Cached keys and values, with the Fields that they came from.

B rows, T tokens, N slots, G key heads, C cached tokens, K key width, V value width, R rows of one
document, L their length, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mm.kernels.attention.spec import NO_MASK, MaskSpec
from mm.layout import Fields, Layout
from mm.mask import Mask
from mm.model.context import Ctx
from mm.model.stateful import StatePart
from mm.model.varlen import PackedRows, merge_fields, refuse_overflow
from mm.state import DataclassState, State


class Writes(NamedTuple):
    """Where the tokens of a call go in a cache, and what lies in it then."""

    before: Tensor  # (N,) int64 tokens seen, of slots that go on
    fields: Fields  # (N, C) after the call
    after: Tensor  # (N,) int64 tokens seen
    filled: int  # entries of the fullest slot
    known: Fields  # `fields` of these
    masks: dict[str, MaskSpec]  # of the call's one way to look at ``known``, by key
    fresh: Tensor | None  # (N,) slots that are emptied first; None: none
    # Where each new token goes `(N, L)`; ``pull``: which one each entry takes `(N, C)`. None: none
    index: Tensor | None = None
    some: Tensor | None = None  # those of ``index`` that do; None: all
    pull: bool = False
    at: int | None = None  # the first of the entries that follow each other, alike in all slots


@dataclass(frozen=True)
class KV(DataclassState):
    """Keys and values of the last C tokens of each slot; token i of a slot lies at ``i % C``."""

    k: Tensor  # (N, G, C, K) after rotation
    v: Tensor  # (N, G, C, V)
    fields: Fields  # (N, C): `document` is 1 where something is stored, else 0
    count: Tensor  # (N,) int64 tokens seen
    ring: bool  # old tokens may be overwritten (bounded reach); else C is the longest document

    def holds_call(self, L: int) -> bool:
        """Whether rows with slots of their own may read the cache with this call already in it.

        Nothing that a token still sees is overwritten: a ring loses, to one token, only what is
        out of reach.
        """
        return L == 1 or not self.ring

    def contents(self) -> tuple[Tensor, Tensor, Fields]:
        """Keys `(N, C, G, K)`, values and Fields of all slots, cut to the fullest one."""
        C = _fullest(self.count, self.k.shape[2])
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
        L = k_NLGK.shape[1]
        writes = self.plan(f, L, length_N, fresh_N, some_fresh)
        return self.store(k_NLGK, v_NLGV, writes)

    def plan(
        self, f: Fields, L: int, length_N: Tensor, fresh_N: Tensor, some_fresh: bool
    ) -> Writes:
        """Where `append` stores; caches whose tokens lie alike share it."""
        C = self.k.shape[2]
        base = self._shaped_like(f).fields
        fresh = fresh_N if some_fresh else None
        count = self.count if fresh is None else torch.where(fresh, 0, self.count)
        after = count + length_N
        if not self.ring:
            refuse_overflow(after > C, C)
        if fresh is not None and _any(fresh & (self.count > 0)):
            base = base.map(lambda t: _empty(t, fresh))
        if L == 0:
            return Writes(count, base, count, C, base, {}, fresh)
        if L > C or L * 4 > C:
            # Pull: for each cache entry, the latest of the new tokens that lands there, if any.
            at = torch.arange(C, device=count.device)
            last = (after - 1)[:, None]
            # Index among the new tokens; negative: an old one stays.
            token = last - (last - at) % C - count[:, None]
            some = (token >= 0) & (length_N > 0)[:, None]
            index, pull = token.clamp(0, L - 1), True
        else:
            j = torch.arange(L, device=count.device)
            index, some, pull = (count[:, None] + j) % C, j < length_N[:, None], False
            some = some if _any(~some) else None
        # Never written into: several layers may hold these.
        fields = merge_fields(lambda old, x: _put(old, x, index, some, pull, False), base, f)
        filled, at = _fullest(after, C), None
        if count.device.type == "cpu" and len(count) and not pull and some is None:
            first = int(count.min()) % C
            at = first if bool((count == count[0]).all()) and first + L <= C else None
        known = fields.map(lambda t: t[:, :filled])
        return Writes(count, fields, after, filled, known, {}, fresh, index, some, pull, at)

    def store(self, k_NLGK: Tensor, v_NLGV: Tensor, writes: Writes) -> KV:
        """`append` by its plan."""
        k, v = self.k, self.v
        if writes.fresh is not None and _any(writes.fresh & (self.count > 0)):
            k, v = _empty(k, writes.fresh), _empty(v, writes.fresh)
        if writes.at is not None and not torch.is_grad_enabled():
            L = k_NLGK.shape[1]
            k.narrow(2, writes.at, L).copy_(k_NLGK.movedim(1, -2))
            v.narrow(2, writes.at, L).copy_(v_NLGV.movedim(1, -2))
        elif writes.index is not None:
            more = writes.index, writes.some, writes.pull, not torch.is_grad_enabled()
            k = _put(k, k_NLGK.movedim(1, -2), *more)
            v = _put(v, v_NLGV.movedim(1, -2), *more)
        return KV(k, v, writes.fields, writes.after, self.ring)

    def extend(
        self, k_RLGK: Tensor, v_RLGV: Tensor, f: Fields, docs: PackedRows, draft: bool = False
    ) -> KV | DraftKV:
        """State after a call whose rows are ``docs``."""
        w = docs.slot_writes()
        k, v = w.take(k_RLGK).to(self.k.dtype), w.take(v_RLGV).to(self.v.dtype)
        if draft:
            fields = f.map(w.take)
            return DraftKV(self, k, v, fields, w.length, w.fresh, docs.some_fresh())
        return self.store(k, v, self.plan_call(f, k.shape[1], docs, docs.all_fresh()))

    def plan_call(self, f: Fields, L: int, docs: PackedRows, all_fresh: bool) -> Writes:
        """`plan` of rows; made once for all layers of a pass whose tokens lie alike."""
        mine = self.fields
        of = [self.k.shape[2], self.ring, docs.length, f.position, f.document, f.modality]
        of += [*f.extra, *f.extra.values()]
        if all_fresh:  # whatever was there is gone: its shape alone stays
            of += ["fresh", mine.position.shape[-1], *mine.extra]
        else:
            of += [self.count, mine.position, mine.document, mine.modality]
            of += [*mine.extra, *mine.extra.values()]

        def make() -> Writes:
            w = docs.slot_writes()
            return self.plan(f.map(w.take), L, w.length, w.fresh, docs.some_fresh())

        return docs.layout.cached(make, "writes", *of)

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
    masks: dict[str, MaskSpec]  # what `mask` made

    def mask(self, mask: Mask) -> MaskSpec:
        """Who sees which of the keys; made once for layers whose keys lie alike."""
        if (made := self.masks.get(mask.key)) is None:
            seen = mask.dense(self.fields, self.known)
            # A step of one sequence sees all there is. Only a CPU is asked.
            host = seen.device.type == "cpu" and not torch.compiler.is_compiling()
            made = NO_MASK if host and bool(seen.all()) else MaskSpec(seen)
            self.masks[mask.key] = made
        return made

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


class Rows(NamedTuple):
    """A call in rows of one document, with what the caches of all layers ask of them."""

    docs: PackedRows
    fields: Fields  # (R, L)
    own_slots: bool
    all_fresh: bool

    @staticmethod
    def of(layout: Layout, slots: int) -> Rows:
        docs = PackedRows.of(layout, slots)
        return Rows(docs, docs.fields(layout.fields), docs.own_slots(), docs.all_fresh())


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
        N = state.count.shape[0]
        rows = ctx.layout.cached(lambda: Rows.of(ctx.layout, N), "cached rows", N)
        docs = rows.docs
        k, v = docs.unpack(k_BTGK), docs.unpack(v_BTGV)
        if copy or ctx.draft or not (rows.own_slots and state.holds_call(k.shape[1])):
            seen = self.look_back(k_BTGK, v_BTGV, ctx, state, fields)
            # After that: it may write into the cache, of which the rows are a copy.
            return seen, state.extend(k, v, seen.fields, docs, ctx.draft)
        # Decoding's common case: stored first, then read where it lies, without a copy.
        f = rows.fields if fields is None else docs.fields(fields)
        writes = state.plan_call(f, k.shape[1], docs, rows.all_fresh)
        after = state.store(k.to(state.k.dtype), v.to(state.v.dtype), writes)
        C = writes.filled
        keys = after.k[:, :, :C].transpose(1, 2).to(k_BTGK.dtype)
        values = after.v[:, :, :C].transpose(1, 2).to(v_BTGV.dtype)
        before, masks = writes.before, writes.masks
        return VisibleKeys(docs, f, keys, values, writes.known, before, C, masks), after

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
            {},
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


def _empty(t: Tensor, fresh_N: Tensor) -> Tensor:
    return t.masked_fill(fresh_N.view(-1, *[1] * (t.dim() - 1)), 0)


def _fullest(count_N: Tensor, capacity: int) -> int:
    """Entries of the fullest slot; an accelerator is not asked: it may be full."""
    asked = count_N.device.type == "cpu" and len(count_N)
    return min(capacity, int(count_N.max())) if asked else capacity


def _put(
    old: Tensor, x: Tensor, index: Tensor, some: Tensor | None, pull: bool, in_place: bool
) -> Tensor:
    """``old`` with the new tokens ``x`` in it, as `Writes` says."""
    dim, value, at = 2 if old.dim() == 4 else 1, x.to(old.dtype), _expand(index, old)
    if pull:
        assert some is not None
        return torch.where(_expand(some, old), value.gather(dim, _expand(index, x)), old)
    # Others write back what is there: their targets are distinct from all valid ones, since
    # L <= C.
    if some is not None:
        value = torch.where(_expand(some, old), value, old.gather(dim, at))
    return old.scatter_(dim, at, value) if in_place else old.scatter(dim, at, value)
