"""Chunks of linear attention and what their decay amounts to.

B rows, T tokens, H heads, W width, C tokens of a chunk, M chunks in hand at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Log decay of a block of tokens that is scored at once: exp(16) is far from both ends of float32,
# and an exponent of 16 still has an error of 1e-6 only.
SPAN = 32.0


class Block:
    """The chunks in hand, `(M, B, H, C, .)`, and the factors that their decay amounts to.

    A decay by channel scales queries and keys, so that plain products score the pairs of `base`
    tokens; of `base` = C tokens when it is weak, and of fewer the stronger it is.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        start: int,
        m: int,
        size: int,
        base: int,
    ):
        self.start, self.m, self.size = start, m, size
        self.by_channel = g is not None and g.dim() == 4
        # Halving needs a power of two; tokens of zeros without decay change nothing.
        self.pad = (1 << (size - 1).bit_length()) - size if self.by_channel else 0
        self.base = min(base, size + self.pad)
        self.q, self.k, self.v = self.load(q), self.load(k), self.load(v)
        self.into = self.out = self.total = self.between = self.up = self.down = None
        self.halves: list[tuple[int, Tensor, Tensor]] = []
        if g is None:
            return
        if self.by_channel:
            before, after, total = self._rescaled(self.load(g))
        else:
            # float64: a difference of long sums keeps the short one that it stands for.
            if g.dim() == 1:
                steps = torch.arange(1, size + 1, device=g.device)
                log = (g.double()[:, None] * steps)[None, None, ..., None]
            else:
                log = self.load(g[..., None]).double().cumsum(-2)
            before, after = log.to(g.dtype), (log[..., -1:, :] - log).to(g.dtype)
            total = before[..., -1:, :]
            future = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
            between = (log - log.transpose(-1, -2)).to(g.dtype)
            self.between = between.masked_fill_(future, -torch.inf).exp_()
        self.total = total.exp().transpose(-1, -2).expand(m, *[-1] * 4)
        self.into = before.exp_()  # from the state before the chunk to each block (of one token)
        self.out = after.exp_()  # from each block to the state after the chunk

    def _rescaled(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log decays from the chunk's start to each block, from it to the end, and of the chunk.

        Blocks of `base` tokens are measured at the middle of their decay: queries are multiplied by
        the decay from there to their token, keys divided by it, both within exp(SPAN / 2), so that
        a token's products with its own block need nothing else. Every pair of blocks is divided by
        exactly one border between two groups of 1, 2, .. blocks, and `self.halves` keeps the decays
        from each border and to it: their exponents are <= 0, so none is strong enough to overflow.
        """
        whole = g
        for _ in range(self.base.bit_length() - 1):
            whole = whole[..., 0::2, :] + whole[..., 1::2, :]
        log, half = g.clone(), 1
        while half < self.base:
            self.of(log, half, 1).add_(self.of(log, half, 0)[..., -1:, :])
            half *= 2
        log = log.unflatten(-2, (-1, self.base))
        before = 0.5 * (log[..., 0, :] + log[..., -1, :])
        after = whole - before
        self.up = (log - before[..., None, :]).exp_().flatten(-3, -2)
        self.down = self.up.reciprocal()
        self.q, self.k = self.q * self.up, self.k * self.down
        half = 1
        while half < before.shape[-2]:
            first, second = whole[..., 0::2, :], whole[..., 1::2, :]
            late, early = self.of(before, half, 1), self.of(after, half, 0)
            self.halves.append((half * self.base, late.exp(), early.exp()))
            late += first[..., None, :]
            early += second[..., None, :]
            whole, half = first + second, 2 * half
        return before, after, whole

    def load(self, x: Tensor) -> Tensor:
        """`(B, T, H, W)` to this block's `(M, B, H, C, W)`."""
        rows = x[:, self.start : self.start + self.m * self.size].unflatten(1, (self.m, self.size))
        chunks = rows.permute(1, 0, 3, 2, 4)
        return F.pad(chunks, (0, 0, 0, self.pad)) if self.pad else chunks.contiguous()

    def store(self, to: Tensor, chunks: Tensor) -> None:
        """Inverse of `load`, into ``to`` `(B, T, H, W)`."""
        rows = to[:, self.start : self.start + self.m * self.size].unflatten(1, (self.m, self.size))
        rows.copy_(chunks[..., : self.size, :].permute(1, 0, 3, 2, 4))

    def scores(self) -> Tensor:
        """`(M, B, H, C, C)`: how much of each token's value each token reads."""
        C = self.q.shape[-2]
        if self.base == C:
            a = self.q @ self.k.transpose(-1, -2)
            return a.tril_() if self.between is None else a.mul_(self.between)
        a = self.q.new_zeros(*self.q.shape[:-1], C)
        q, k = self.blocks(self.q), self.blocks(self.k)
        _diagonal(a, self.base).copy_((q @ k.transpose(-1, -2)).tril_())
        for half, late, early in self.halves:
            q, k = times(self.of(self.q, half, 1), late), times(self.of(self.k, half, 0), early)
            _corner(a, half).copy_(q @ k.transpose(-1, -2))
        return a

    def scores_backward(self, da: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `q` and `k` from those of the scores (whose upper half is ignored)."""
        if self.base == da.shape[-1]:
            da = da.tril_() if self.between is None else da.mul_(self.between)
            return da @ self.k, da.transpose(-1, -2) @ self.q
        own = _diagonal(da, self.base).tril()
        dq = (own @ self.blocks(self.k)).flatten(-3, -2)
        dk = (own.transpose(-1, -2) @ self.blocks(self.q)).flatten(-3, -2)
        for half, late, early in self.halves:
            d = _corner(da, half).contiguous()
            q, k = times(self.of(self.q, half, 1), late), times(self.of(self.k, half, 0), early)
            self.of(dq, half, 1).add_(times(d @ k, late))
            self.of(dk, half, 0).add_(times(d.transpose(-1, -2) @ q, early))
        return dq, dk

    def blocks(self, x: Tensor) -> Tensor:
        """`(..., C, W)` to `(..., C / base, base, W)`."""
        return x.unflatten(-2, (-1, self.base))

    @staticmethod
    def of(x: Tensor, half: int, which: int) -> Tensor:
        """The first or second halves of blocks of two halves, `(..., C / 2 / half, half, W)`."""
        return x.unflatten(-2, (x.shape[-2] // (2 * half), 2, half)).select(-3, which)


def _diagonal(a: Tensor, size: int) -> Tensor:
    """View of scores `(..., C, C)`: those of blocks with themselves, `(..., n, size, size)`."""
    n = a.shape[-1] // size
    blocks = a.unflatten(-1, (n, size)).unflatten(-3, (n, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _corner(a: Tensor, half: int) -> Tensor:
    """Return a view of scores `(..., C, C)`: second halves with first ones.

    Its shape is `(..., n, half, half)`.
    """
    n = a.shape[-1] // (2 * half)
    blocks = a.unflatten(-1, (n, 2, half)).unflatten(-4, (n, 2, half))
    return blocks.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x`` `(..., C, W)` with a factor for each of n blocks of tokens, `(..., n, W or 1)`."""
    if factor is None:
        return x
    blocks = x.unflatten(-2, (factor.shape[-2], x.shape[-2] // factor.shape[-2]))
    return (blocks * factor[..., None, :]).flatten(-3, -2)
