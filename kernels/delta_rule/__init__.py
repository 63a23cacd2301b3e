"""(Gated) delta rule over time.

B rows, T tokens, H heads, K key width, V value width; in the chunk form n chunks of C tokens and N
= B * H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import device
from mm.kernels.fused import register_kernel
from mm.kernels.op import Op, exact

CHUNK = 64  # tokens; the matrices of a chunk are as large as a head's state of 64 x 64
LEAF = 16  # tokens; CHUNK is this times a power of two


@Op
@exact
def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g_BTH: Tensor | None = None,
    initial_BHKV: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Erase what each key reads from the state, write its value there, read the query.

    ``S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T`` and ``o_t = scale S_t^T
    q_t`` over each row and head.

    Keys are taken as they are. With ``|k| <= 1`` and beta in [0, 2] the state cannot grow by
    itself; beta above 1 makes the eigenvalue along ``k_t`` negative.

    Args:
        q_BTHK: `(B, T, H, K)` queries, any float dtype; accumulated in float32 or wider.
        k_BTHK: `(B, T, H, K)` keys.
        v_BTHV: `(B, T, H, V)` values.
        beta_BTH: `(B, T, H)` strengths of writing; a token with beta = 0 and g = 0 changes nothing.
        g_BTH: `(B, T, H)` natural logarithm of the decay, finite and <= 0; None = no decay.
        initial_BHKV: `(B, H, K, V)` state before the first token; None = zeros.
        scale: factor of the output.
    Returns:
        outputs `(B, T, H, V)` in the dtype of ``q`` and the last state `(B, H, K, V)` in float32 or
        wider.
    Source: Yang et al. 2024, Gated Delta Networks (arXiv:2412.06464), eq. 10; g = None: Schlag et
    al. 2021 (arXiv:2102.11174), eq. 24-25, as in Yang et al. 2024 (arXiv:2406.06484), section 2.2.
    """
    wide = _wide(q_BTHK)
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[-1]
    if initial_BHKV is not None:
        S = initial_BHKV.to(wide)
    else:
        S = q_BTHK.new_zeros(B, H, K, V, dtype=wide)
    if T == 0:
        return q_BTHK.new_zeros(B, 0, H, V), S
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step, which makes
    # the loop quadratic.
    over_time = lambda x: x.to(wide).unbind(1)
    decays = over_time(g_BTH) if g_BTH is not None else [None] * T
    outputs = []
    for q, k, v, beta, g in zip(
        *map(over_time, (q_BTHK, k_BTHK, v_BTHV, beta_BTH)), decays, strict=True
    ):
        if g is not None:
            S = S * g.exp()[..., None, None]
        read = (k[..., None, :] @ S)[..., 0, :]
        S = S + k[..., None] * (beta[..., None] * (v - read))[..., None, :]
        outputs.append((q[..., None, :] @ S)[..., 0, :])
    return (scale * torch.stack(outputs, 1)).to(q_BTHK.dtype), S


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sizes(T: int) -> tuple[int, int]:
    """Number of chunks and their length: alike, to pad little, and fit for `_inverse`."""
    n = -(-T // CHUNK)
    C = -(-T // n)
    return n, C if C <= LEAF else -(-C // (CHUNK // LEAF)) * (CHUNK // LEAF)


def _split(x: Tensor, wide: torch.dtype) -> Tensor:
    """`(B, T, H, ...)` to contiguous `(n, N, C, ...)`; padding is zero."""
    B, T, H = x.shape[:3]
    n, C = _sizes(T)
    if n * C > T:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, n * C - T))
    x = x.view(B, n, C, *x.shape[2:]) if x.is_contiguous() else x.unflatten(1, (n, C))
    x = x.movedim((1, 0, 3), (0, 1, 2))
    return x.to(wide, memory_format=torch.contiguous_format, copy=True).view(
        n, B * H, C, *x.shape[4:]
    )


def _inverse(L: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``(I + L)^-1`` of strictly lower `(..., C, C)`, in ``out`` if given.

    Blocks of at most LEAF are solved by substitution and merged by ``-T22 L21 T11``. Its
    entries are no larger than beta while keys are no longer than 1. In float32 that is also ten
    times as exact as one substitution where beta is near 2.
    """
    C = L.shape[-1]
    if C <= LEAF:
        one = torch.eye(C, dtype=L.dtype, device=L.device).expand_as(L)
        made = torch.linalg.solve_triangular(L, one, upper=False, unitriangular=True)
        return made if out is None else out.copy_(made)
    h = C // 2
    t11, t22 = _inverse(torch.stack((L[..., :h, :h], L[..., h:, h:]))).unbind(0)
    out = torch.zeros_like(L) if out is None else out.zero_()
    out[..., :h, :h], out[..., h:, h:] = t11, t22
    out[..., h:, :h] = (t22 @ L[..., h:, :h] @ t11).neg_()
    return out


def _join(x: Tensor, to: Tensor) -> None:
    """Inverse of `_split`, into contiguous ``to`` `(B, T, H, ...)`."""
    n, N, C = x.shape[:3]
    B, T = to.shape[:2]
    x = x.unflatten(1, (B, N // B)).movedim((0, 1, 2), (1, 0, 3))
    if n * C == T:
        to.view(x.shape).copy_(x)
    else:
        to.copy_(x.flatten(1, 2)[:, :T])


class _Parts(NamedTuple):
    """What both directions need of the chunks `(n, N, C, ...)`.

    Without decay every factor is None.
    """

    q: Tensor  # times scale
    k: Tensor
    v: Tensor
    beta: Tensor  # (n, N, C, 1)
    since: Tensor | None  # (n, N, C, 1) decay from the chunk's begin to each token
    until: Tensor | None  # (n, N, C, 1) decay from each token to the chunk's end
    whole: Tensor | None  # (n, N, 1, 1) decay over the chunk
    between: Tensor | None  # (n, N, C, C) decay from token j to token i, 0 for i < j
    kk: Tensor  # (n, N, C, C) products of keys, decayed, strictly lower
    qk: Tensor  # (n, N, C, C) products of queries and keys, decayed, lower

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float) -> _Parts:
        wide = _wide(q)
        q, k, v = _split(q, wide).mul_(scale), _split(k, wide), _split(v, wide)
        beta = _split(beta, wide)[..., None]
        kk, qk = k @ k.mT, q @ k.mT
        if g is None:
            return _Parts(q, k, v, beta, None, None, None, None, kk.tril_(-1), qk.tril_())
        # Sums in float64: after strong decay small differences would lose their bits in float32.
        G = _split(g, torch.float64).cumsum(-1)
        C = G.shape[-1]
        future = torch.ones(C, C, dtype=torch.bool, device=G.device).triu_(1)
        apart = (G[..., :, None] - G[..., None, :]).to(wide)
        between = apart.masked_fill_(future, -torch.inf).exp_()
        narrow = lambda x: x.to(wide).exp()[..., None]
        return _Parts(
            q,
            k,
            v,
            beta,
            narrow(G),
            narrow(G[..., -1:] - G),
            narrow(G[..., -1:]),
            between,
            kk.mul_(between).tril_(-1),
            qk.mul_(between),
        )

    def inner(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as the chunk's first and last state see them."""
        if self.since is None or self.until is None:
            return self.q, self.k
        return self.q * self.since, self.k * self.until


@exact
def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None,
    scale: float, out: Tensor, last: Tensor,
    solve: Tensor, uw: Tensor, states: Tensor, written: Tensor,
) -> None:  # fmt: skip
    """Write what `_empties` makes."""
    p = _Parts.of(q, k, v, beta, g, scale)
    B, T, H, K = q.shape
    n, N, C, V = p.v.shape
    begun = p.k if p.since is None else p.k * p.since
    _inverse(p.kk * p.beta, solve)
    torch.matmul(solve, torch.cat((p.v, begun), -1).mul_(p.beta), out=uw)
    qs, ks = p.inner()
    readers = torch.cat((uw[..., V:], qs), -2)
    o = torch.empty_like(p.v)
    S = uw.new_zeros(N, K, V) if initial is None else initial.reshape(N, K, V)
    for c in range(n):
        states[c] = S
        read = torch.bmm(readers[c], S)
        torch.sub(uw[c, ..., :V], read[:, :C], out=written[c])
        o[c] = read[:, C:]
        S = S if p.whole is None else S * p.whole[c]
        S = torch.baddbmm(S, ks[c].mT, written[c])
    flat = lambda x: x.flatten(0, 1)
    flat(o).baddbmm_(flat(p.qk), flat(written))
    last.copy_(S.view(B, H, K, V))
    _join(o, out)


@exact
def _backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None,
    scale: float, solve: Tensor, uw: Tensor, states: Tensor, written: Tensor,
    grad_o: Tensor | None, grad_last: Tensor | None, grad_q: Tensor, grad_k: Tensor,
    grad_v: Tensor, grad_beta: Tensor, grad_g: Tensor, grad_initial: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, beta, of g if there is decay and of an initial state."""
    p = _Parts.of(q, k, v, beta, g, scale)
    B, T, H, K = q.shape
    n, N, C, V = p.v.shape
    do = torch.zeros_like(p.v) if grad_o is None else _split(grad_o, uw.dtype)
    qs, ks = p.inner()
    w = uw[..., V:]
    # Through time: gradients of the written rows and of every chunk's last state.
    minus = torch.matmul(p.qk.mT, do).neg_()
    after = torch.empty_like(states)
    readers = torch.cat((qs, w), -2)
    if grad_last is None:
        dS = uw.new_zeros(N, K, V)
    else:
        dS = grad_last.to(uw.dtype).reshape(N, K, V)
    for c in reversed(range(n)):
        after[c] = dS
        minus[c].baddbmm_(ks[c], dS, alpha=-1)
        both = torch.cat((do[c], minus[c]), -2)
        dS = torch.baddbmm(dS if p.whole is None else dS * p.whole[c], readers[c].mT, both)
    if initial is not None:
        grad_initial.copy_(dS.reshape(B, H, K, V))
    # Inside the chunks, all at once.
    dqs, dw = torch.matmul(torch.cat((do, minus), -2), states.mT).split(C, -2)
    dks = torch.matmul(written, after.mT)
    dqk = torch.matmul(do, written.mT)
    drhs = solve.mT @ torch.cat((-minus, dw), -1)
    dkk = torch.matmul(drhs, uw.mT).neg_().tril_(-1)  # of kk times beta
    dv, dbegun = drhs[..., :V], drhs[..., V:]
    faded = p.k if p.since is None else p.k * p.since
    dbeta = (dkk * p.kk).sum(-1) + (dv * p.v).sum(-1) + (dbegun * faded).sum(-1)
    dkk = dkk * p.beta
    dbegun = dbegun * p.beta
    if p.since is None or p.until is None or p.whole is None or p.between is None:
        dqk = dqk.tril_()
        dq, dk = dqs, dbegun + dks
    else:
        # exp(G_i - G_j) appears in kk and qk, exp(G_i) in qs and begun, exp(G_C - G_i) in ks. What
        # is exp(0) is left out, or its large gradients would cancel but for their rounding.
        moved = (dkk * p.kk).add_((dqk * p.qk).tril_(-1))
        dG = moved.sum(-1) - moved.sum(-2)
        dG += (dqs * qs).sum(-1) + (dbegun * faded).sum(-1)
        dG[..., -1] += (after * states).sum((-2, -1)) * p.whole[..., 0, 0]
        rate = dG.flip(-1).cumsum(-1).flip(-1)
        rate[..., 1:] += (dks * ks).sum(-1)[..., :-1].cumsum(-1)
        _join(rate, grad_g)
        dkk, dqk = dkk * p.between, dqk * p.between
        dq, dk = dqs * p.since, dbegun * p.since + dks * p.until
    dq = dq + dqk @ p.k
    dk = dk + dqk.mT @ p.q + (dkk + dkk.mT) @ p.k
    _join(dq.mul_(scale), grad_q)
    _join(dk, grad_k)
    _join(dv * p.beta, grad_v)
    _join(dbeta, grad_beta)


def _empties(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return outputs, last state, and what the backward reads.

    That is: every chunk's inverse `(n, N, C, C)`, ``[U W]`` `(n, N, C, V + K)`, first state
    `(n, N, K, V)` and written rows `(n, N, C, V)`.
    """
    (B, T, H, K), V, wide = q.shape, v.shape[-1], _wide(q)
    n, C = _sizes(T)
    return (
        q.new_empty(B, T, H, V),
        q.new_empty(B, H, K, V, dtype=wide),
        q.new_empty(n, B * H, C, C, dtype=wide),
        q.new_empty(n, B * H, C, V + K, dtype=wide),
        q.new_empty(n, B * H, K, V, dtype=wide),
        q.new_empty(n, B * H, C, V, dtype=wide),
    )


# The WY form: within a chunk the rows ``u`` that are truly written solve one unitriangular system.
# Source: Yang et al. 2024 (arXiv:2406.06484), section 3; decay: arXiv:2412.06464, section 3.3.
register_kernel(
    delta_rule,
    "o last",
    _empties,
    kept="solve uw states written",
    saved="q k v beta g initial scale solve uw states written",
    gradients="q k v beta g initial",
    dense=False,
    wide="initial",
    strided="*",
    # A single step is the fastest as it is.
    trivial=lambda q, *_: q.shape[1] <= 1 or q.shape[0] == 0,
    plain={"chunk": (_forward, _backward)},
)


def _triton_empties(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    solved = k.new_empty(B, H, -(-T // CHUNK), CHUNK, CHUNK)
    return torch.empty_like(v), q.new_empty(B, H, K, V, dtype=torch.float32), solved


def _triton_why_not(way: str, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> str | None:
    return "keys are wider than 256" if q.shape[-1] > 256 else device.why_empty(q, v)


# The chunk form on a GPU; all but the chunks' inverses is computed again in the backward. Products
# of float32 are tf32x3, those of bfloat16 and float16 have float32 sums; inverses are float32's.
register_kernel(
    delta_rule,
    "o last",
    _triton_empties,
    kept="solved",
    saved="q k v beta g initial solved scale",
    gradients="q k v beta g initial",
    dense=False,
    wide="initial",
    prepare=lambda q, k, v, *rest: (*device.promote(q, k, v), *rest),
    result=lambda q, *rest: (rest[-3].to(q.dtype), rest[-2]),
    why_not=_triton_why_not,
    triton="chunk_triton",
)
