"""Formulas of floating-point operations of this project's own operators, from shapes alone.

Products count two a multiply-add, as torch's `flop_registry` does, which has the formulas of
torch's operators. A recurrence counts what its definition does a token, whatever form computes it.

R rows, T tokens, S keys, H heads, K key width, V value width, D channels, N states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., float]
BACKWARD = 2.0  # times the forward: one gradient a factor
TILES = 2.5  # of attention in tiles: the scores again, and four products for the forward's two
CHUNK = 64  # tokens of a chunk of `linear_attention` and `delta_rule`


def _attention(q: Tensor, k: Tensor, v: Tensor, *specs: Any) -> float:
    (R, T, H, K), S, V = q.shape, k.shape[1], v.shape[-1]
    causal, window = specs[1], specs[2]
    return 2.0 * R * H * (K + V) * pairs(T, S, causal, window)


def pairs(T: int, S: int, causal: bool, window: int | None) -> float:
    """(query, key) pairs that a mask leaves; the last query sees the last key."""
    if not causal and window is None:
        return float(T * S)
    before, most = max(0, S - T), min(window or S, S)
    rising = min(T, max(0, most - before))  # queries that see all keys up to their own
    return float(rising * before + rising * (rising + 1) // 2 + (T - rising) * most)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> float:
    (R, T, H, K), V = q.shape, v.shape[-1]
    inside = min(CHUNK, T) / 2  # scores and outputs within a chunk, of which half are seen
    return 2.0 * R * T * H * (2 * K * V + inside * (K + V))


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> float:
    (R, T, H, K), V = q.shape, v.shape[-1]
    C = min(CHUNK, T)
    # state read, written and erased; scores, keys against keys, the inverse and what it multiplies
    return 2.0 * R * T * H * (3 * K * V + C / 2 * (2 * K + V) + C * C / 6 + C / 2 * (K + V))


def _cross_entropy(h: Tensor, weight: Tensor, *_: Any) -> float:
    return 2.0 * h.shape[0] * weight.shape[0] * weight.shape[1]


def _each(n: float) -> Formula:
    """``n`` operations an element of the first argument."""
    return lambda x, *_: n * x.numel()


def _states(n: float, of: int, dims: tuple[int, ...]) -> Formula:
    """``n`` operations an element of the first argument and a state of argument ``of``."""
    return lambda *given: n * given[0].numel() * math.prod(given[of].shape[d] for d in dims)


# name of an `Op` -> operations of its forward, from the arguments of its `torch.library` operator
FORWARD: dict[str, Formula] = {
    "attention": _attention,
    "attention_statistics": _attention,
    "linear_attention": _linear_attention,
    "delta_rule": _delta_rule,
    "linear_cross_entropy": _cross_entropy,
    "grouped_linear": lambda x, weight, *_: 2.0 * x.numel() * weight.shape[1],  # each row, once
    "linear_scan": _each(2),
    "complex_scan": lambda a, b, *_: 8.0 * b.numel(),  # complex multiply-add
    # exp(dt a) h + dt u b and c . h: decay 2, input 2, state 2, output 2
    "selective_scan": _states(8, 2, (0,)),
    "diagonal_ssm": lambda u, a, c, *_: 12.0 * u.numel() * a.shape[2] * c.shape[0],
    "causal_conv": lambda u, weight, *_: 2.0 * u.numel() * weight.shape[0],
    "rg_lru_gates": _each(6),
    "glu": _each(4),
    "glu_halves": _each(2),
    "rms_norm": _each(4),
    "add_rms_norm": _each(5),
    "norm_rotary": _each(7),
    "rotary": lambda *given: 3.0 * max(x.numel() for x in given),  # gradients come last
    "dropout": _each(2),
}
_TIMES = {
    "attention": TILES,
    "rms_norm": 3.0,
    "add_rms_norm": 2.6,
    "norm_rotary": 2.5,
    "rotary": 1.0,
}


def formula_of(name: str) -> Formula | None:
    """Formula of an operator ``mm::name``; None where there is none.

    Its `Op` is the longest known beginning of the name; a backward takes first what was saved, in
    the order in which the forward took it.
    """
    op = max((n for n in FORWARD if name == n or name.startswith(f"{n}_")), key=len, default=None)
    if op is None:
        return None
    forward = FORWARD[op]
    if not name.endswith("_backward"):
        return forward
    times = _TIMES.get(op, BACKWARD)
    return lambda *given: times * forward(*given)


def flops_of(func: Any, args: Any, kwargs: Any, made: Any) -> float | None:
    """Operations of one call; 0 of what only moves data, None of an operator without a formula."""
    namespace, _, rest = func.name().partition("::")
    if namespace == "mm":
        found = formula_of(rest.partition(".")[0])
        return None if found is None else float(found(*args))
    if func.name() in _NAMED:
        return float(_NAMED[func.name()](*args, **kwargs))
    packet = func._overloadpacket
    if packet in _FUSED:
        return float(_FUSED[packet](*args))
    return (
        float(flop_registry[packet](*args, **kwargs, out_val=made))
        if packet in flop_registry
        else 0.0
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False) -> float:
    (B, H, T, K), S, V = q.shape, k.shape[2], v.shape[-1]
    return 2.0 * B * H * (K + V) * pairs(T, S, causal, None)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, at: Any, at_k: Any, longest: int, longest_k: int,
    causal: bool = False, scale: float | None = None, window_size: Sequence[int] | None = None,
    *_: Any, **__: Any,
) -> float:  # fmt: skip
    """As `_attention`, of whole rows: where their documents begin is a value, not a shape."""
    (P, H, K), V = q.shape, v.shape[-1]
    left, right = window_size or (-1, -1)
    seen = pairs(longest, longest, causal or right == 0, left + 1 if left >= 0 else None)
    return 2.0 * P / max(1, longest) * H * (K + V) * seen


def _varlen_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *rest: Any,
    window_size: Sequence[int] | None = None, **__: Any,
) -> float:  # fmt: skip
    *places, causal, _ = rest[:6]
    window = rest[7] if len(rest) > 7 else window_size
    return TILES * _varlen(q, k, v, *places, causal, None, window)


# Of torch, but registered by the module that has them.
_NAMED: dict[str, Formula] = {
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}
aten = torch.ops.aten
# torch has no formulas of attention on a CPU, none of products by group, and does not see a mask
_FUSED: dict[Any, Formula] = {
    aten._grouped_mm: lambda a, b, *_: 2.0 * a.numel() * b.shape[-1],  # gradients are such, too
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *a: _sdpa(*a[:5]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, out, lse, dropout, causal, *_: TILES * _sdpa(q, k, v, 0.0, causal)
    ),
    aten._scaled_dot_product_flash_attention: lambda *a: _sdpa(*a[:5]),
    aten._scaled_dot_product_flash_attention_backward: (
        lambda g, q, k, v, *a: TILES * _sdpa(q, k, v, 0.0, a[7])
    ),
    aten._scaled_dot_product_cudnn_attention: (
        lambda q, k, v, bias, lse, dropout=0.0, causal=False, *_: _sdpa(q, k, v, dropout, causal)
    ),
    aten._scaled_dot_product_cudnn_attention_backward: (
        lambda g, q, k, v, *a: TILES * _sdpa(q, k, v, 0.0, a[10])
    ),
}
