"""Attention in tiles (``.blocks``, ``.flash_triton``) as a differentiable `torch.library` op."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.kernels.attention import blocks
from mm.kernels.attention.blocks import TENSORS, Setting
from mm.kernels.fused import traced

GRADS = ("bias", "fade_q", "fade_k", "relative", "sink")


def _module(how: Setting) -> Any:
    """Imported by the first call: Triton may be absent."""
    return importlib.import_module(f"mm.kernels.attention.{how.way}")


def _forward(q: Tensor, k: Tensor, v: Tensor, *setting: Any) -> tuple[Tensor, Tensor]:
    how = Setting(*setting)
    return _module(how).forward(q, k, v, how)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    need: list[bool],
    *setting: Any,
) -> list[Tensor]:
    """Gradients of q, k, v and of all that ``need`` (one flag a name of GRADS) asks for."""
    names = [name for name, needed in zip(GRADS, need, strict=True) if needed]
    how = Setting(*setting)
    made = _module(how).backward(q, k, v, how, y, lse, dy, names)
    return [made[name] for name in ("q", "k", "v", *names)]


def _statistics(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *setting: Any
) -> tuple[Tensor, Tensor]:
    return blocks.statistics(q, k, v, Setting(*setting), lse)


_QKV = "Tensor q, Tensor k, Tensor v"
_SETTING = ", ".join(f"Tensor? {name}" for name in TENSORS)
_SETTING += ", bool causal, int window, float scale, float softcap, str way"


def _define(name: str, f: Any, first: str, returns: str) -> Any:
    schema = f"({first}, {_SETTING}) -> {returns}"
    return torch.library.custom_op(f"mm::{name}", f, mutates_args=(), schema=schema)


_op = _define("attention_blocks", _forward, _QKV, "(Tensor, Tensor)")
_backward_op = _define(
    "attention_blocks_backward",
    _backward,
    f"{_QKV}, Tensor y, Tensor lse, Tensor dy, bool[] need",
    "Tensor[]",
)
_statistics_op = _define(
    "attention_statistics", _statistics, f"{_QKV}, Tensor lse", "(Tensor, Tensor)"
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *setting: Any) -> tuple[Tensor, Tensor]:
    (R, T, H, _), G = q.shape, k.shape[2]
    wide = torch.promote_types(v.dtype, torch.float32)
    y = v.new_empty(R, T, H, v.shape[-1])
    return y, v.new_empty(R * G, H // G, T, 1, dtype=wide)


@_backward_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    need: list[bool],
    *setting: Any,
) -> list[Tensor]:
    given = [getattr(Setting(*setting), n) for n, needed in zip(GRADS, need, strict=True) if needed]
    return [x.new_empty(x.shape) for x in (q, k, v, *given)]


@_statistics_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *setting: Any) -> tuple[Tensor, Tensor]:
    R, T, H, _ = q.shape
    return lse.new_empty(R, H, k.shape[1]), lse.new_empty(R, H, T)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    n = 3 + len(TENSORS)
    ctx.save_for_backward(*inputs[:n], *output)
    ctx.rest = inputs[n:]


def _grads(
    ctx: Any, dy: Tensor, _: Tensor, by: Callable[..., list[Tensor]] | None = None
) -> tuple[Tensor | None, ...]:
    by = by or torch.ops.mm.attention_blocks_backward
    q, k, v, *tensors, y, lse = ctx.saved_tensors
    asked = dict(zip(TENSORS, ctx.needs_input_grad[3:], strict=False))
    # Both sides of the fade come together.
    asked["fade_q"] = asked["fade_k"] = asked["fade_q"] or asked["fade_k"]
    need = [asked[name] for name in GRADS]
    made = iter(by(q, k, v, y, lse, dy, need, *tensors, *ctx.rest))
    first = [next(made), next(made), next(made)]
    by_name = {name: next(made) for name in GRADS if asked[name]}
    return *first, *(by_name.get(name) for name in TENSORS), *(None for _ in ctx.rest)


_op.register_autograd(_grads, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The same without `torch.library`, as in `mm.kernels.fused`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _grads(ctx, dy, _, by=_backward)


def run(q: Tensor, k: Tensor, v: Tensor, *setting: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (without gradient) of ``setting``, the fields of `Setting`."""
    inputs = (q, k, v, *setting)
    return torch.ops.mm.attention_blocks(*inputs) if traced(inputs) else _Direct.apply(*inputs)


def measured(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *setting: Any) -> tuple[Tensor, Tensor]:
    """`blocks.statistics`, without gradient."""
    given = (t.detach() if isinstance(t, Tensor) else t for t in (q, k, v, lse, *setting))
    return torch.ops.mm.attention_statistics(*given)
