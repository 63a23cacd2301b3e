"""First-order recurrence over time.

B rows, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def linear_scan(
    a_BTD: Tensor,
    b_BTD: Tensor,
    reset_BT: Tensor | None = None,
    initial_BD: Tensor | None = None,
    *,
    reverse: bool = False,
    log: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t * h_{t-1} + b_t`` over each row and channel.

    Args:
        a_BTD: `(B, T, D)` decays, any float dtype; accumulated in float32 or wider.
        b_BTD: `(B, T, D)` inputs.
        reset_BT: `(B, T)` bool: here ``h_t = b_t``, whatever was read before (a document begins,
            or ends if reversed); None = nowhere.
        initial_BD: `(B, D)` state before the first token that is read; None = zeros.
        reverse: read from the last token to the first, ``h_t = a_t * h_{t+1} + b_t``.
        log: all numbers are positive and given by their logarithms, results too: ``log h_t =
            log(exp(log a_t + log h_{t-1}) + exp(log b_t))``, which no size of theirs overflows.
            Only ``initial`` may hold -inf, a zero.
    Returns:
        all states `(B, T, D)` and the one of the token that is read last `(B, D)`, both in float32
        or wider.
    Source: Martin & Cundy 2018 (arXiv:1709.04057), eq. 5; in logarithms: Heinsen 2023
        (arXiv:2311.06281), summed step by step, which keeps bits that its prefix sums lose.
    """
    wide = torch.promote_types(b_BTD.dtype, torch.float32)
    B, T, D = b_BTD.shape
    zero = -torch.inf if log else 0.0
    h = initial_BD.to(wide) if initial_BD is not None else b_BTD.new_full((B, D), zero, dtype=wide)
    if T == 0:
        return b_BTD.to(wide), h
    # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step, which makes
    # the loop quadratic.
    resets = reset_BT.unbind(1) if reset_BT is not None else [None] * T
    steps = list(zip(a_BTD.to(wide).unbind(1), b_BTD.to(wide).unbind(1), resets, strict=True))
    states = []
    for a, b, reset in reversed(steps) if reverse else steps:
        before = h if reset is None else h.masked_fill(reset[:, None], zero)
        decay = a if reset is None else a.masked_fill(reset[:, None], 0)
        h = torch.logaddexp(decay + before, b) if log else decay * before + b
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1), h


def empty_states(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    """Return memory for the states of a scan, in float32 or wider."""
    return torch.empty_like(b, dtype=torch.promote_types(b.dtype, torch.float32))


def with_last_state(
    a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None, reverse: bool, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the states of a scan, which come last, and the one of the token read last."""
    h = rest[-1]
    return h, h[:, 0] if reverse else h[:, -1]


def _fill(
    a: Tensor, b: Tensor, reset: Tensor | None, initial: Tensor | None,
    reverse: bool, log: bool, h: Tensor,
) -> None:  # fmt: skip
    """Write the recurrence of the reference in place: nothing is kept for a backward."""
    before = initial
    for at, bt, out, cut in _steps(a, b, h, reset, backwards=reverse):
        if before is None:
            out.copy_(bt)
        elif log:
            torch.logaddexp(at + before, bt, out=out)
        else:
            torch.addcmul(bt, at, before, out=out)
        if cut is not None:  # a choice, not a product with zero: the state before may be inf
            torch.where(cut, bt, out, out=out)
        before = out


def _fill_gradients(
    a: Tensor, b: Tensor | None, h: Tensor, reset: Tensor | None, initial: Tensor | None,
    reverse: bool, log: bool, dy: Tensor, da: Tensor, db: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    """Scan ``dh_t = dy_t + (share of h_t in h_{t+1}) dh_{t+1}`` the other way, into ``db``."""
    first, rest, before = (
        (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))
    )
    da[:, rest] = h[:, before]  # the state before each token
    da[:, first] = initial if initial is not None else (-torch.inf if log else 0.0)
    share = _share(a + da, h) if log else a
    dh = later = later_cut = None
    for link, g, out, cut in _steps(share, dy, db, reset, backwards=not reverse):
        if dh is None or later is None:
            out.copy_(g)
        else:
            torch.addcmul(g, later, dh, out=out)
        if later_cut is not None:
            torch.where(later_cut, g, out, out=out)
        dh, later, later_cut = out, link, cut
    if initial is not None:
        assert dh is not None and later is not None
        torch.mul(dh, later, out=dinitial)
        if later_cut is not None:
            dinitial.masked_fill_(later_cut, 0)
    torch.mul(share if log else da, db, out=da)
    if reset is not None:
        da.masked_fill_(reset[..., None], 0)
    if b is not None:
        db.mul_(_share(b, h))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), the share of a sum; 1 of equal numbers, infinite ones too."""
    return (part - whole).masked_fill_(part == whole, 0).exp_()


def _steps(
    x: Tensor, y: Tensor, out: Tensor, reset: Tensor | None, *, backwards: bool
) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Tokens of `(B, T, D)` tensors in turn, `(B, D)` each, and where they begin again."""
    cuts = reset[..., None].unbind(1) if reset is not None else [None] * x.shape[1]
    steps = list(zip(x.unbind(1), y.unbind(1), out.unbind(1), cuts, strict=True))
    return reversed(steps) if backwards else steps


register_kernel(
    linear_scan,
    "h",
    empty_states,
    saved="a b h reset initial reverse log",
    only={"b": "log"},  # only logarithms ask again how much of a state its input was
    gradients="a b:h initial",
    like="b",
    own="a b",
    wide="initial",
    result=with_last_state,
    trivial=lambda a, b, *_: b.shape[1] == 0,
    # Where no compiler is: a third of the time of autograd over the reference.
    plain={"loop": (_fill, _fill_gradients)},
    cpp="scan",
    arguments=lambda a, *rest: (a, *rest, *a.shape),
    triton="scan_triton",
)
