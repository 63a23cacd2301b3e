"""How kernels are compared with their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.op import Op

TOL = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return (
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .requires_grad_()
    )


def check(op: Op, name: str, arguments: tuple[Any, ...], dtype: torch.dtype, **kw: Any) -> None:
    """Compare outputs and gradients with those of the float64 reference.

    The gradients are those of a random weighting of all outputs.
    """
    reason = op.implementations[name][1](*arguments, **kw)
    if reason:
        pytest.skip(f"{name}: {reason}")

    def run(implementation: str, wide: bool) -> tuple[list[Tensor], list[Tensor]]:
        args = [
            a.detach().clone().to(torch.float64 if wide and a.is_floating_point() else a.dtype)
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        leaves = [
            a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()
        ]
        with op.using(implementation):
            out = op(*args, **kw)
        outs = list(out) if isinstance(out, tuple) else [out]
        loss = sum(
            (o.double() * randn(*o.shape, seed=9 + i).detach()).sum() for i, o in enumerate(outs)
        )
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return outs, []
        return outs, [
            g if g is not None else torch.zeros_like(a)
            for g, a in zip(
                torch.autograd.grad(loss, leaves, allow_unused=True), leaves, strict=True
            )
        ]

    got, expected = run(name, wide=False), run("reference", wide=True)
    plain: list[Tensor] = []  # the reference in the dtype itself, where somebody needs it
    pairs = zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape
        try:
            torch.testing.assert_close(a.double(), b.double(), **TOL[dtype])
        except AssertionError:
            # A chain of products may magnify rounding: the reference's own error in float32 is the
            # measure then (gradients of 80 that err by 3e-5), and thrice that is allowed.
            if dtype != torch.float32 or name == "reference":
                raise
            if not plain:
                made = run("reference", wide=False)
                plain = [*made[0], *made[1]]
            own = (plain[i].double() - b.double()).abs().max().item()
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=3 * own)


def here(op: Op) -> list[str]:
    """What may run in this process; Triton needs its interpreter (test_triton_*.py)."""
    return [name for name in op.implementations if name != "triton"]


def others(op: Op) -> list[str]:
    return [name for name in here(op) if name != "reference"]


dtypes = pytest.mark.parametrize("dtype", TOL, ids=["fp64", "fp32"])


def packed() -> tuple[MaskSpec]:
    """All that hides keys: rows of many documents with a window and prefixes."""
    number = torch.ones(1, 64, dtype=torch.int32)
    return (MaskSpec(None, True, 32, number, number, number, number),)


def everything() -> tuple[MaskSpec, ScoreSpec]:
    """All settings that the kernel has: what takes the most registers."""
    fade = torch.empty(1, 64, 8, requires_grad=True)
    sink = torch.empty(8, requires_grad=True)
    return (
        *packed(),
        ScoreSpec(fade_RTH=fade, fade_RSH=fade, softcap=30.0, sink_H=sink),
    )
