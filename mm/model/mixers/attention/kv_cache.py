"""State of attention: cached keys and values with the Fields they came from.

N slots, G key heads, C cache places, K key width, V value width, L places of a call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mm.layout import Fields
from mm.model.varlen import PackedRows, SlotWrites, paired
from mm.state import DataclassState


@dataclass(frozen=True)
class KV(DataclassState):
    """Keys and values of the last C tokens of each slot; token i of a slot lies at ``i % C``."""

    k: Tensor  # (N, G, C, K) after rotation
    v: Tensor  # (N, G, C, V)
    fields: Fields  # (N, C): `document` is 1 where something is stored, else 0
    count: Tensor  # (N,) int64 tokens seen
    ring: bool  # old tokens may be overwritten (bounded reach); else C is the longest document

    @staticmethod
    def empty(n: int, heads: int, places: int, k: int, v: int, ring: bool, like: Tensor) -> KV:
        """``n`` fresh slots."""
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int32, device=like.device)
        return KV(
            like.new_zeros(n, heads, places, k),
            like.new_zeros(n, heads, places, v),
            Fields(zeros(n, places, 1), zeros(n, places), zeros(n, places)),
            torch.zeros(n, dtype=torch.long, device=like.device),
            ring,
        )

    @staticmethod
    def bytes(n: int, heads: int, places: int, k: int, v: int, item: int) -> int:
        """Bytes of `empty`: keys and values, three int32 fields a place, one int64 count a slot."""
        return n * (heads * places * (k + v) * item + places * 12 + 8)

    def accept(self, n_N: Tensor) -> KV:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> KV:
        """The state itself: nothing is pending."""
        return self

    def holds_call(self, docs: PackedRows, L: int) -> bool:
        """True when the rows may read the cache with this call already in it: each its own slot,
        and nothing they still
        see is overwritten (a ring loses, to one token, only what is out of reach)."""
        return docs.direct and (L == 1 or not self.ring) and bool((docs.slot >= 0).all())

    def seen(self) -> tuple[Tensor, Tensor, Fields]:
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
        """Keys `(R, G, C, K)`, values and Fields `(R, C)` that each row of a call may look back
        at.
        """
        return docs.read(self.k), docs.read(self.v), self._shaped_like(f).fields.map(docs.read)

    def append(
        self,
        k_NLGK: Tensor,
        v_NLGV: Tensor,
        f: Fields,
        length_N: Tensor,
        fresh_N: Tensor,
        hit_N: Tensor,
    ) -> KV:
        """Store the first ``length_N`` places of each slot's row; a fresh slot is emptied first.

        Raises:
            ValueError: a document outgrows ``max_len`` of `initial_state`.
        """
        C, L = self.k.shape[2], k_NLGK.shape[1]
        base = self._shaped_like(f)
        in_place = not torch.is_grad_enabled()
        count = torch.where(fresh_N, 0, base.count)
        if not self.ring and bool((count + length_N > C).any()):
            raise ValueError(
                f"a document outgrew its State of {C} tokens; give initial_state a larger max_len"
            )
        if bool((fresh_N & (base.count > 0)).any()):
            base = base.map(lambda t: t.masked_fill(fresh_N.view(-1, *[1] * (t.dim() - 1)), 0))
        if L == 0:
            return replace(base, count=count)
        if L > C or L * 4 > C:
            # Pull: for each cache place, which of the new tokens (the latest that lands here), if
            # any.
            at = torch.arange(C, device=count.device)
            last = (count + length_N - 1)[:, None]
            token = (
                last - (last - at) % C - count[:, None]
            )  # index among the new tokens; negative = an old one stays
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
            paired(put, base.fields, f),
            count + length_N,
            self.ring,
        )

    def _shaped_like(self, f: Fields) -> KV:
        """Grow position axes and extra fields to those of the call (they are unknown when a State
        is made).
        """
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
    """A KV state with the places of a draft call not stored yet."""

    base: KV
    k: Tensor  # (N, L, G, K)
    v: Tensor
    fields: Fields
    length: Tensor  # (N,) places drafted
    fresh: Tensor  # (N,) bool
    hit: Tensor  # (N,) bool

    def accept(self, n_N: Tensor) -> KV:
        n = torch.minimum(n_N.to(self.length), self.length)
        valid = torch.arange(self.k.shape[1], device=n.device) < n[:, None]
        fields = self.fields._replace(document=valid.to(torch.int32))
        return self.base.append(self.k, self.v, fields, n, self.fresh, self.hit)

    def commit(self) -> KV:
        """Everything drafted counts."""
        return self.accept(self.length)


def advance(
    state: KV, k_RLGK: Tensor, v_RLGV: Tensor, f: Fields, docs: PackedRows, draft: bool
) -> KV | DraftKV:
    """State after a call whose rows are ``docs``."""
    w: SlotWrites = docs.written(state.count.shape[0])
    k, v = w.take(k_RLGK).to(state.k.dtype), w.take(v_RLGV).to(state.v.dtype)
    fields = f.map(w.take)
    if draft:
        return DraftKV(state, k, v, fields, w.length, w.fresh, w.hit)
    return state.append(k, v, fields, w.length, w.fresh, w.hit)


def _expand(index: Tensor, like: Tensor) -> Tensor:
    """`(N, L)` places to the shape of `(N, [G,] L, [K])`."""
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
    # Invalid places write back what is there: their targets are distinct from all valid ones, since
    # L <= C.
    value = x.to(old.dtype)
    if not bool(valid.all()):
        value = torch.where(_expand(valid, old), value, old.gather(dim, index))
    return old.scatter_(dim, index, value) if in_place else old.scatter(dim, index, value)
