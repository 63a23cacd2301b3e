"""Chunkwise linear attention with decay.

B rows, T tokens, H heads, K key width, V value width.

Inside: C tokens of a chunk, N chunks, M of them in hand at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import device
from mm.kernels.fused import register_kernel
from mm.kernels.linear_attention.chunks import SPAN, Block, times
from mm.kernels.op import Op, exact

CHUNK = 64
IN_HAND = 1 << 18  # elements of a working tensor: what a core's cache holds
ASKED = ("cpu",)  # devices whose decays say how they are scored: others would wait for the answer


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


def _blocks(B: int, T: int, H: int, K: int, V: int) -> Iterator[tuple[int, int, int]]:
    """First token, number of chunks and their size, of as many chunks as a cache holds."""
    whole = T // CHUNK
    most = max(1, IN_HAND // max(1, B * H * CHUNK * max(K, V, CHUNK)))
    for first in range(0, whole, most):
        yield first * CHUNK, min(most, whole - first), CHUNK
    if T % CHUNK:
        yield whole * CHUNK, 1, T % CHUNK


def _shares(g: Tensor | None) -> list[tuple[Tensor | None, int]]:
    """Rows (None = all) and how many of their tokens are scored at once.

    A row's own decay alone decides that: no document moves a bit of another one's results.
    """
    if g is None or g.dim() < 4 or not g.numel():
        return [(None, CHUNK)]
    if g.device.type not in ASKED:
        return [(None, 1)]  # right for any decay
    sums = F.pad(g, (0, 0, 0, 0, 0, -g.shape[1] % CHUNK))
    base = torch.ones(g.shape[0], dtype=torch.long, device=g.device)
    fits, size = base.bool(), 1
    while size < CHUNK and bool(fits.any()):
        sums, size = sums[:, 0::2] + sums[:, 1::2], 2 * size
        fits &= sums.flatten(1).amin(1) >= -SPAN
        base[fits] = size
    found = [int(n) for n in base.unique()]
    if len(found) == 1:
        return [(None, found[0])]
    return [((base == n).nonzero()[:, 0], n) for n in found]


@exact
def _forward(*given: Any) -> None:
    """Write what `_empties` makes, row by row where their decays want chunks of other sizes."""
    inputs, outs = given[:5], given[5:]
    for rows, base in _shares(inputs[3]):
        if rows is None:
            _forward_rows(base, *given)
            continue
        some: list[Any] = [None if x is None else x[rows] for x in inputs]
        made = _empties(*some)
        _forward_rows(base, *some, *made)
        for out, at, x in zip(outs, (rows, rows, (slice(None), rows)), made, strict=True):
            out[at] = x


def _forward_rows(
    base: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None,
    o: Tensor, final: Tensor, states: Tensor,
) -> None:  # fmt: skip
    (B, T, H, K), V = q.shape, v.shape[-1]
    states[0] = 0 if initial is None else initial
    at = 0
    for start, m, size in _blocks(B, T, H, K, V):
        b = Block(q, k, v, g, start, m, size, base)
        gain = times(b.k, b.out).transpose(-1, -2) @ b.v
        for i in range(m):
            if b.total is None:
                torch.add(gain[i], states[at + i], out=states[at + i + 1])
            else:
                torch.addcmul(gain[i], b.total[i], states[at + i], out=states[at + i + 1])
        y = b.scores() @ b.v
        y += times(b.q, b.into) @ states[at : at + m]
        b.store(o, y)
        at += m
    final.copy_(states[-1])


@exact
def _backward(*given: Any) -> None:
    """Write the gradients, row by row as `_forward`."""
    q, k, v, g, states, initial, do, dfinal, *outs = given
    for rows, base in _shares(g):
        if rows is None:
            _backward_rows(base, *given)
            continue
        pick = lambda *some, rows=rows: [None if x is None else x[rows] for x in some]
        some: list[Any] = [*pick(q, k, v, g), states[:, rows], *pick(initial, do, dfinal)]
        made: list[Any] = [x.new_empty(x[rows].shape if len(x) else 0) for x in outs]
        _backward_rows(base, *some, *made)
        for out, x in zip(outs, made, strict=True):
            if len(out):
                out[rows] = x


def _backward_rows(
    base: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor,
    initial: Tensor | None, do: Tensor | None, dfinal: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    (B, T, H, K), V = q.shape, v.shape[-1]
    do = v.new_zeros(B, T, H, V) if do is None else do
    dstate = v.new_zeros(B, H, K, V) if dfinal is None else dfinal
    at = states.shape[0] - 1
    if g is not None and g.dim() == 1:
        dg.zero_()
    for start, m, size in reversed(list(_blocks(B, T, H, K, V))):
        at -= m
        b = Block(q, k, v, g, start, m, size, base)
        dy = b.load(do)
        read = times(b.q, b.into).transpose(-1, -2) @ dy
        after = v.new_empty(m, B, H, K, V)  # gradients of the states after each chunk
        for i in reversed(range(m)):
            after[i] = dstate
            dstate = read[i] + (dstate if b.total is None else dstate * b.total[i])
        chunk_dv = b.scores().transpose(-1, -2) @ dy
        chunk_dv += times(b.k, b.out) @ after
        chunk_dq, chunk_dk = b.scores_backward(dy @ b.v.transpose(-1, -2))
        chunk_dq += times(dy @ states[at : at + m].transpose(-1, -2), b.into)
        chunk_dk += times(b.v @ after.transpose(-1, -2), b.out)
        if g is not None:
            # A token's cumulative decay multiplies its query and divides its key; the last one's
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
    if initial is not None:
        dinitial.copy_(dstate)


def _empties(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    states = v.new_empty(1 + -(-T // CHUNK), B, H, K, V)
    return v.new_empty(B, T, H, V), v.new_empty(B, H, K, V), states


# Matrix products inside chunks, one state a chunk between them.
register_kernel(
    linear_attention,
    "o final",
    _empties,
    kept="states",
    saved="q k v log_decay states initial",
    gradients="q k v log_decay initial",
    dense=False,
    like="v",
    wide="q k v log_decay initial",
    strided="*",
    trivial=lambda q, *_: q.shape[1] == 0,
    plain={"chunked": (_forward, _backward)},
)


def _triton_empties(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    o = q.new_empty(B, T, H, V, dtype=torch.float32)
    return o, o.new_empty(B, H, K, V)


def _to_whole_loads(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Inputs of one dtype whose widths are multiples of 8: a GPU loads 16 bytes at a time.

    Odd widths are loaded number by number, which fills the registers; zeros change nothing.
    """
    q, k, v = device.promote(q, k, v)
    more_k, more_v = -q.shape[-1] % 8, -v.shape[-1] % 8
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
        if log_decay is not None and log_decay.dim() == 4:
            log_decay = F.pad(log_decay, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial is not None and (more_k or more_v):
        initial = F.pad(initial, (0, more_v, 0, more_k))
    return q, k, v, log_decay, initial


def _own_widths(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, initial: Any, o: Tensor, final: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs without the columns that `_to_whole_loads` added."""
    K, V = q.shape[-1], v.shape[-1]
    if o.shape[-1] == V and final.shape[-2] == K:
        return o, final
    return o[..., :V], final[..., :K, :V]


# The chunk form on a GPU; states are computed again in the backward. Products of float32 are
# tf32x3, those of bfloat16 and float16 have float32 sums.
register_kernel(
    linear_attention,
    "o final",
    _triton_empties,
    saved="q k v log_decay initial",
    gradients="q k v log_decay initial",
    dense=False,
    wide="initial",
    prepare=_to_whole_loads,
    result=_own_widths,
    why_not=lambda way, q, k, v, *_, **__: device.why_empty(q, v),
    triton="chunk_triton",
)
