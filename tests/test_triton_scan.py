"""Triton kernels of the scan family: equal to their references in the interpreter, built for sm_90.

Small tiles stand for the real ones where a test says so: a carry crosses tiles after a few places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_oracle import built, interpreted, recorded  # noqa: E402

from mm.kernels.linear_scan import gpu as linear_gpu, linear_scan  # noqa: E402
from mm.kernels.op import Op  # noqa: E402

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def compare(op: Op, arguments: tuple[Any, ...], dtype: torch.dtype, **kw: Any) -> None:
    """Outputs and all gradients of Triton and the reference, on the same narrow values."""
    narrow = tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
    found = []
    for name in ("reference", "triton"):
        wide = torch.float64 if name == "reference" else dtype
        args = [
            a.detach().to(wide).requires_grad_()
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in narrow
        ]
        with interpreted(), op.using(name):
            out = op(*args, **kw)
            outs = out if isinstance(out, tuple) else (out,)
            loss = sum((o.double() * torch.arange(o.numel()).sin().view(o.shape)).sum() for o in outs)
            leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            found.append((*outs, *torch.autograd.grad(loss, leaves)))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for i, (expected, got) in enumerate(zip(*found, strict=True)):
        scale = expected.square().mean().sqrt()
        error = (got.double() - expected).square().mean().sqrt() / (scale + 1e-6)
        assert error < tolerance, f"result {i}: {error:.1e}"
        assert got.isfinite().all()


def resets(B: int, T: int) -> Tensor:
    """Ragged documents, one of them a single token; the second row is one document."""
    out = torch.zeros(B, T, dtype=torch.bool)
    for t in (0, 3, 4, T - 1):
        out[0, min(t, T - 1)] = True
    return out


def small_tiles(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "PLACES", 16)
    monkeypatch.setattr(module, "CHANNELS", 16)


@dtypes
@pytest.mark.parametrize("T", [1, 3, 37])
def test_linear_scan(T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, linear_gpu)
    torch.manual_seed(T)
    a, b = torch.rand(2, T, 20), torch.randn(2, T, 20)
    compare(linear_scan, (a, b), dtype)
    compare(linear_scan, (a, b, resets(2, T), torch.randn(2, 20)), dtype)


def test_linear_scan_forgets_an_infinite_document() -> None:
    a, b = torch.full((1, 6, 2), 0.5), torch.ones(1, 6, 2)
    b[0, 1] = torch.inf
    with interpreted(), linear_scan.using("triton"):
        h, last = linear_scan(a, b, torch.tensor([[1, 0, 0, 1, 0, 0]]).bool())
    assert last.isfinite().all() and torch.equal(h[0, 3], torch.ones(2))


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call with its backward launches, each built and checked."""
    with recorded() as asked:
        out = call()
        outs = out if isinstance(out, tuple) else (out,)
        sum(o.float().sum() for o in outs).backward()
    return [built(launch).check().name for launch in asked]


@dtypes
def test_linear_scan_is_built_for_hopper(dtype: torch.dtype) -> None:
    a = torch.empty(2, 4096, 1024, dtype=dtype, requires_grad=True)
    first = torch.empty(2, 1024, requires_grad=True)
    reset = torch.empty(2, 4096, dtype=torch.bool)
    with linear_scan.using("triton"):
        assert launches(lambda: linear_scan(a, a, reset, first)) == ["_forward", "_backward"]
