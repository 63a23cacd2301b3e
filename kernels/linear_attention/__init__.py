"""Chunkwise linear attention with decay. B rows, T tokens, H heads, K key width, V value width.

Inside: C places of a chunk, N chunks, M of them in hand at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import device
from mm.kernels.fused import fused
from mm.kernels.op import Op, exact

CHUNK = 64
IN_HAND = 1 << 18  # elements of a working tensor: what a core's cache holds
# Log decay of a block of places that is scored at once: exp(16) is far from both ends of float32,
# and an exponent of 16 still has an error of 1e-6 only.
SPAN = 32.0


@Op
@exact
def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and read ``o_t = S_t^T q_t``.

    Args:
        q_BTHK: `(B, T, H, K)` queries, already scaled; accumulated in float32 or wider.
        k_BTHK: `(B, T, H, K)` keys.
        v_BTHV: `(B, T, H, V)` values.
        log_decay: finite and <= 0: None = no decay, `(H,)` constant, `(B, T, H)` by head and token,
            `(B, T, H, K)` by channel.
        initial_BHKV: `(B, H, K, V)` state before the first token; None = zeros.
    Returns:
        outputs `(B, T, H, V)` and the last state `(B, H, K, V)`, both in float32 or wider.
    Source: Katharopoulos et al. 2020 (arXiv:2006.16236), eq. 18-20; decay by channel: Yang et al.
    2023 (arXiv:2312.06635), eq. 3.
    """
    q, k, v, g, state = _widened(q_BTHK, k_BTHK, v_BTHV, log_decay, initial_BHKV)
    B, T, H, K = q.shape
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1])
    if T == 0:
        return v, state
    decays: list[Tensor | None] = [None] * T
    if g is not None:
        full = g.expand(B, T, H) if g.dim() == 1 else g
        decays = list((full if g.dim() == 4 else full[..., None]).exp().unbind(1))
    outputs = []
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step.
    for qt, kt, vt, at in zip(q.unbind(1), k.unbind(1), v.unbind(1), decays, strict=True):
        before = state if at is None else at[..., None] * state
        state = before + kt[..., None] * vt[..., None, :]
        outputs.append((qt[..., None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def _widened(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    wide = torch.promote_types(v.dtype, torch.float32)
    return (
        q.to(wide),
        k.to(wide),
        v.to(wide),
        g.to(wide) if g is not None else None,
        initial.to(wide) if initial is not None else None,
    )


def _why_not(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> str | None:
    return None


@linear_attention.register("chunked", _why_not)
def _chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Matrix products inside chunks, one state a chunk between them; a hand-written backward."""
    q, k, v, g, initial = _widened(q_BTHK, k_BTHK, v_BTHV, log_decay, initial_BHKV)
    if q.shape[1] == 0:
        B, _, H, K = q.shape
        return v, initial if initial is not None else q.new_zeros(B, H, K, v.shape[-1])
    o, final, _ = _CHUNKED(q, k, v, g, initial)
    return o, final


def _blocks(B: int, T: int, H: int, K: int, V: int) -> Iterator[tuple[int, int, int]]:
    """First place, number of chunks and their size, of as many chunks as a cache holds."""
    whole = T // CHUNK
    most = max(1, IN_HAND // max(1, B * H * CHUNK * max(K, V, CHUNK)))
    for first in range(0, whole, most):
        yield first * CHUNK, min(most, whole - first), CHUNK
    if T % CHUNK:
        yield whole * CHUNK, 1, T % CHUNK


class _Block:
    """The chunks in hand, `(M, B, H, C, .)`, and the factors that their decay amounts to.

    A decay by channel scales queries and keys, so that plain products score the pairs of `base`
    places; of `base` = C places when it is weak, and of fewer the stronger it is.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: int, m: int, size: int
    ):
        self.start, self.m, self.size = start, m, size
        self.by_channel = g is not None and g.dim() == 4
        # Halving needs a power of two; places of zeros without decay change nothing.
        self.pad = (1 << (size - 1).bit_length()) - size if self.by_channel else 0
        self.base = size + self.pad
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
        self.into = before.exp_()  # from the state before the chunk to each block (of one place)
        self.out = after.exp_()  # from each block to the state after the chunk

    def _rescaled(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log decays from the chunk's start to each block, from it to the end, and of the chunk.

        Blocks of `base` places are measured at the middle of their decay: queries are multiplied by
        the decay from there to their place, keys divided by it, both within exp(SPAN / 2), so that
        a place's products with its own block need nothing else. Every pair of blocks is divided by
        exactly one border between two groups of 1, 2, .. blocks, and `self.halves` keeps the decays
        from each border and to it: their exponents are <= 0, so none is strong enough to overflow.
        """
        C, whole, self.base = g.shape[-2], g, 1
        while self.base < C and g.numel():
            pairs = whole[..., 0::2, :] + whole[..., 1::2, :]
            if not pairs.amin() >= -SPAN:
                break
            whole, self.base = pairs, 2 * self.base
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
        """`(M, B, H, C, C)`: how much of each place's value each place reads."""
        C = self.q.shape[-2]
        if self.base == C:
            a = self.q @ self.k.transpose(-1, -2)
            return a.tril_() if self.between is None else a.mul_(self.between)
        a = self.q.new_zeros(*self.q.shape[:-1], C)
        q, k = self.blocks(self.q), self.blocks(self.k)
        _diagonal(a, self.base).copy_((q @ k.transpose(-1, -2)).tril_())
        for half, late, early in self.halves:
            q, k = _times(self.of(self.q, half, 1), late), _times(self.of(self.k, half, 0), early)
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
            q, k = _times(self.of(self.q, half, 1), late), _times(self.of(self.k, half, 0), early)
            self.of(dq, half, 1).add_(_times(d @ k, late))
            self.of(dk, half, 0).add_(_times(d.transpose(-1, -2) @ q, early))
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
    """View of scores `(..., C, C)`: those of second halves with first ones, `(..., n, half,
    half)`.
    """
    n = a.shape[-1] // (2 * half)
    blocks = a.unflatten(-1, (n, 2, half)).unflatten(-4, (n, 2, half))
    return blocks.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``x`` `(..., C, W)` with a factor for each of n blocks of places, `(..., n, W or 1)`."""
    if factor is None:
        return x
    blocks = x.unflatten(-2, (factor.shape[-2], x.shape[-2] // factor.shape[-2]))
    return (blocks * factor[..., None, :]).flatten(-3, -2)


@exact
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    o: Tensor,
    final: Tensor,
    states: Tensor,
) -> None:
    (B, T, H, K), V = q.shape, v.shape[-1]
    states[0] = 0 if initial is None else initial
    at = 0
    for start, m, size in _blocks(B, T, H, K, V):
        b = _Block(q, k, v, g, start, m, size)
        gain = _times(b.k, b.out).transpose(-1, -2) @ b.v
        for i in range(m):
            if b.total is None:
                torch.add(gain[i], states[at + i], out=states[at + i + 1])
            else:
                torch.addcmul(gain[i], b.total[i], states[at + i], out=states[at + i + 1])
        y = b.scores() @ b.v
        y += _times(b.q, b.into) @ states[at : at + m]
        b.store(o, y)
        at += m
    final.copy_(states[-1])


@exact
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    begun: bool,
    do: Tensor | None,
    dfinal: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dinitial: Tensor,
) -> None:
    (B, T, H, K), V = q.shape, v.shape[-1]
    do = v.new_zeros(B, T, H, V) if do is None else do
    dstate = v.new_zeros(B, H, K, V) if dfinal is None else dfinal
    at = states.shape[0] - 1
    if g is not None and g.dim() == 1:
        dg.zero_()
    for start, m, size in reversed(list(_blocks(B, T, H, K, V))):
        at -= m
        b = _Block(q, k, v, g, start, m, size)
        dy = b.load(do)
        read = _times(b.q, b.into).transpose(-1, -2) @ dy
        after = v.new_empty(m, B, H, K, V)  # gradients of the states after each chunk
        for i in reversed(range(m)):
            after[i] = dstate
            dstate = read[i] + (dstate if b.total is None else dstate * b.total[i])
        chunk_dv = b.scores().transpose(-1, -2) @ dy
        chunk_dv += _times(b.k, b.out) @ after
        chunk_dq, chunk_dk = b.scores_backward(dy @ b.v.transpose(-1, -2))
        chunk_dq += _times(dy @ states[at : at + m].transpose(-1, -2), b.into)
        chunk_dk += _times(b.v @ after.transpose(-1, -2), b.out)
        if g is not None:
            # A place's cumulative decay multiplies its query and divides its key; the last one's
            # multiplies the state after the chunk. Each decay is in all cumulative ones after it.
            d = b.q * chunk_dq - b.k * chunk_dk
            ends = (states[at + 1 : at + m + 1] * after).sum(-1)[..., None, :]
            if not b.by_channel:
                d, ends = d.sum(-1, keepdim=True), ends.sum(-1, keepdim=True)
            later = d.new_ones(d.shape[-2], d.shape[-2]).triu_()
            d = later @ d + ends
            if g.dim() == 1:
                dg += d.sum((0, 1, 3, 4))
            else:
                b.store(dg if b.by_channel else dg[..., None], d)
        b.store(dq, chunk_dq if b.up is None else chunk_dq.mul_(b.up))
        b.store(dk, chunk_dk if b.down is None else chunk_dk.mul_(b.down))
        b.store(dv, chunk_dv)
    if begun:
        dinitial.copy_(dstate)


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    chunks = (T + CHUNK - 1) // CHUNK
    states = v.new_empty(1 + chunks, B, H, K, V)
    return v.new_empty(B, T, H, V), v.new_empty(B, H, K, V), states


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    states: Tensor,
    begun: bool,
    do: Tensor | None,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dg = q.new_empty(0 if g is None else g.shape)
    return dq, dk, dv, dg, states.new_empty(*states.shape[1:] if begun else (0,))


_WRT = ("q", "k", "v", "g", "initial")
_CHUNKED = fused(
    "linear_attention",
    _outputs,
    _gradients,
    saved=lambda q, k, v, g, initial, o, final, states: (q, k, v, g, states, initial is not None),
    wrt=_WRT,
    dense=False,
    chunked=(_forward, _backward),
)["chunked"]


def _triton_outputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, V, dtype=torch.float32)
    return o, o.new_empty(B, H, K, V)


def _triton_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg = q.new_empty(0) if g is None else torch.empty_like(g)
    return dq, dk, dv, dg, dfinal.new_empty(dfinal.shape)


_TRITON = fused(
    "linear_attention",
    _triton_outputs,
    _triton_gradients,
    saved=lambda *tensors: tensors[:5],
    wrt=_WRT,
    triton=f"{__name__}.chunk_triton",
)["triton"]


def _no_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> str | None:
    reason = device.why_not(q_BTHK, k_BTHK, v_BTHV, log_decay, initial_BHKV)
    return reason or ("nothing to launch" if 0 in (*q_BTHK.shape, v_BTHV.shape[-1]) else None)


@linear_attention.register("triton", _no_triton)
def _triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunk form on a GPU; states are computed again in the backward. Products of float32 are
    tf32x3, those of bfloat16 and float16 have float32 sums.
    """
    q, k, v = device.narrow(q_BTHK, k_BTHK, v_BTHV)
    g = None if log_decay is None else log_decay.contiguous()
    initial = None if initial_BHKV is None else initial_BHKV.float().contiguous()
    return _TRITON(q, k, v, g, initial)
