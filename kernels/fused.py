"""Fused kernels as differentiable `torch.library` ops: one shape rule, filled by C++ and Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

Fill = Callable[..., None]


def fused(
    name: str,
    outputs: Callable,
    gradients: Callable,
    *,
    saved: Callable[..., Sequence[Any]],
    wrt: Sequence[str],
    dense: bool = True,
    triton: str | None = None,
    **here: tuple[Fill, Fill],
) -> dict[str, Callable]:
    """Register ``mm::<name>``, and ``mm::<name>_<kind>`` for all but the first of ``here``, with
    backward, tracing and autograd.

    A call that nothing traces goes past `torch.library`, whose dispatch in Python costs a small
    model more than its kernels do.

    Args:
        name: of the op.
        outputs: takes the inputs and returns empty outputs. It is the op's schema (by annotation)
            and its shape rule under `torch.compile`.
        gradients: takes what ``saved`` returns, then a gradient of each output that has one, and
            returns empty gradients: one for each name of ``wrt``, of size 0 where that input is
            None.
        saved: takes the inputs and the outputs and returns what the backward needs.
        wrt: parameter names of ``outputs`` that have gradients.
        dense: gradients that nothing gives are zeros, else None.
        triton: module with functions ``forward`` and ``backward`` that write the outputs and the
            gradients in Triton: they take the inputs, then the outputs. It is imported by the first
            call and must not be before: Triton may be absent.
        here: by the name of their implementation, two functions that do the same otherwise.
    Returns:
        the op by the name of its implementation.
    """
    first = next(iter(here), None)
    fills = {k: (name if k == first else f"{name}_{k}", pair) for k, pair in here.items()}
    if triton:
        lazily = lambda way: lambda *a: getattr(importlib.import_module(triton), way)(*a)
        fills["triton"] = (f"{name}_triton", (lazily("forward"), lazily("backward")))
    return {
        kind: _differentiable(full, outputs, gradients, pair, saved, wrt, dense)
        for kind, (full, pair) in fills.items()
    }


def _op(name: str, empties: Callable, fill: Fill) -> tuple[Any, Callable, Callable]:
    def run(*args: Any) -> Any:
        outs = empties(*args)
        fill(*args, *(outs if isinstance(outs, tuple) else (outs,)))
        return outs

    schema = torch.library.infer_schema(empties, mutates_args=())
    made = torch.library.custom_op(f"mm::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(empties)
    return made, getattr(torch.ops.mm, name), run


def traced(args: tuple[Any, ...]) -> bool:
    """Whether anything but plain autograd looks at a call: a compiler, a mode, a transform or a
    tensor of a class of its own.
    """
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
        or any(
            isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not torch.nn.Parameter
            for x in args
        )
    )


def _differentiable(
    name: str,
    outputs: Callable,
    gradients: Callable,
    fills: tuple[Fill, Fill],
    saved: Callable[..., Sequence[Any]],
    wrt: Sequence[str],
    dense: bool,
) -> Callable:
    made, forward, run = _op(name, outputs, fills[0])
    _, backward, run_backward = _op(f"{name}_backward", gradients, fills[1])
    parameters = [a.name for a in forward.default._schema.arguments]
    taken = len(backward.default._schema.arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = saved(*inputs, *(output if isinstance(output, tuple) else (output,)))
        tensor = [isinstance(x, Tensor) or x is None for x in kept]
        ctx.save_for_backward(*(x for x, is_tensor in zip(kept, tensor, strict=True) if is_tensor))
        ctx.settings = [
            (is_tensor, None if is_tensor else x) for x, is_tensor in zip(kept, tensor, strict=True)
        ]
        ctx.given = [x is not None for x in inputs]
        if not dense:
            ctx.set_materialize_grads(False)

    def grads(
        ctx: Any, *from_above: Tensor | None, by: Callable = backward
    ) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        kept = [next(tensors) if is_tensor else value for is_tensor, value in ctx.settings]
        above = [g.contiguous() if g is not None else None for g in from_above]
        found = by(*kept, *above[: taken - len(kept)])
        by_name = dict(
            zip(wrt, found if isinstance(found, (tuple, list)) else (found,), strict=True)
        )
        return tuple(
            by_name.get(p) if given else None
            for p, given in zip(parameters, ctx.given, strict=True)
        )

    made.register_autograd(grads, setup_context=setup)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outs = run(*args)
            setup(ctx, args, outs)
            return outs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *from_above: Tensor | None) -> Any:
            return grads(ctx, *from_above, by=run_backward)

    def call(*args: Any) -> Any:
        if len(args) < len(parameters) or traced(args):
            return forward(*args)
        return Direct.apply(*args)

    return call
