"""The selective scan equals its reference in outputs and all gradients.

It grows linearly and keeps no state of every place.
"""

from __future__ import annotations

import platform
import time

import pytest
import torch
from kernel_checks import TOL, check, dtypes, here, others, randn
from torch import Tensor

from mm.kernels.selective_scan import selective_scan


def arguments(
    R: int, T: int, D: int, N: int, reset: str = "never", initial: bool = False, rate: float = 1.0
) -> tuple[Tensor | None, ...]:
    resets = {
        "never": None,
        "some": torch.rand(R, T, generator=torch.Generator().manual_seed(1)) < 0.1,
        # documents of 1, many and 1 tokens
        "ragged": (torch.arange(T) <= 1).logical_or(torch.arange(T) == T - 1).expand(R, T),
        "always": torch.ones(R, T, dtype=torch.bool),
    }[reset]
    return (
        randn(R, T, D),
        randn(R, T, D, seed=1).abs().detach() * rate,
        -randn(N, D, seed=2).exp().detach(),
        randn(R, T, N, seed=3),
        randn(R, T, N, seed=4),
        randn(D, seed=5),
        resets,
        randn(R, N, D, seed=6) if initial else None,
    )


def cast(args: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(
        a.detach().to(dtype) if a is not None and a.is_floating_point() else a for a in args
    )


@dtypes
@pytest.mark.parametrize("name", others(selective_scan))
@pytest.mark.parametrize(
    "R,T,D,N",
    [
        (1, 1, 1, 1),
        (2, 3, 5, 16),
        (1, 63, 60, 4),
        (2, 64, 32, 3),
        (1, 65, 33, 16),
        (1, 130, 7, 5),
        (2, 0, 3, 2),
        (0, 4, 3, 2),
    ],
)
@pytest.mark.parametrize("reset", ["never", "some", "ragged", "always"])
@pytest.mark.parametrize("initial", [False, True])
def test_equals_the_reference(
    name: str, dtype: torch.dtype, R: int, T: int, D: int, N: int, reset: str, initial: bool
) -> None:
    # Sums over all rows and places (a, skip) and long products: float32 on their own scale.
    args = arguments(R, T, D, N, reset, initial, rate=1.0 if dtype == torch.float64 else 0.3)
    scaled = tuple(a.detach() * 0.3 if i in (0, 3, 4) else a for i, a in enumerate(args))
    check(selective_scan, name, cast(scaled, dtype), dtype)


@pytest.mark.parametrize("name", others(selective_scan))
@pytest.mark.parametrize("rate", [0.0, 1e-3, 30.0], ids=["dt 0", "slow", "at once"])
def test_any_decay(name: str, rate: float) -> None:
    check(
        selective_scan, name, cast(arguments(1, 66, 5, 4, rate=rate), torch.float64), torch.float64
    )


@pytest.mark.parametrize("name", others(selective_scan))
@pytest.mark.parametrize("part", [0, 1], ids=["only y", "only the last state"])
def test_gradient_of_one_output_alone(name: str, part: int) -> None:
    args = [
        a.detach().requires_grad_() for a in arguments(2, 70, 6, 3, initial=True) if a is not None
    ]
    grads = []
    for implementation in (name, "reference"):
        with selective_scan.using(implementation):
            out = selective_scan(*args[:6], None, args[6])[part]
        grads.append(torch.autograd.grad(out.square().sum(), args, allow_unused=True))
    for got, expected in zip(*grads, strict=True):
        expected = expected if expected is not None else torch.zeros_like(got)
        torch.testing.assert_close(got, expected, **TOL[torch.float64])


@pytest.mark.parametrize("name", here(selective_scan))
def test_halves_equal_the_whole(name: str) -> None:
    u, dt, a, b, c, skip, _, initial = arguments(2, 90, 5, 4, initial=True)
    with selective_scan.using(name):
        whole, end = selective_scan(u, dt, a, b, c, skip, None, initial)
        first, middle = selective_scan(
            u[:, :31], dt[:, :31], a, b[:, :31], c[:, :31], skip, None, initial
        )
        second, last = selective_scan(
            u[:, 31:], dt[:, 31:], a, b[:, 31:], c[:, 31:], skip, None, middle
        )
    torch.testing.assert_close(torch.cat((first, second), 1), whole, **TOL[torch.float64])
    torch.testing.assert_close(last, end, **TOL[torch.float64])


@pytest.mark.parametrize("name", here(selective_scan))
def test_an_empty_place_keeps_the_state_bit_for_bit(name: str) -> None:
    u, dt, a, b, c, skip, _, initial = arguments(2, 3, 5, 4, initial=True)
    with selective_scan.using(name):
        _, last = selective_scan(u * 0, dt * 0, a, b * 0, c, skip, None, initial)
    assert torch.equal(last, initial)


@pytest.mark.parametrize("name", here(selective_scan))
def test_resets_select_and_do_not_multiply(name: str) -> None:
    u, dt, a, b, c, skip, *_ = (
        x.detach() if x is not None else None for x in arguments(1, 6, 3, 2)
    )
    u[0, 1] = float("inf")
    leaves = [x.requires_grad_() for x in (u, dt, b, c)]
    reset = torch.tensor([[True, False, False, True, False, False]])
    with selective_scan.using(name):
        y, last = selective_scan(u, dt, a, b, c, skip, reset)
    assert y[0, 3:].isfinite().all() and last.isfinite().all()
    for g in torch.autograd.grad(y[0, 3:].sum() + last.sum(), leaves):
        assert g[0, 3:].isfinite().all()


@pytest.mark.parametrize("name", here(selective_scan))
def test_narrow_types_and_any_strides(name: str) -> None:
    args = arguments(2, 9, 8, 4)
    with selective_scan.using("reference"):
        expected, _ = selective_scan(*args)
    with selective_scan.using(name):
        y, last = selective_scan(*cast(args, torch.bfloat16))
        turned = [
            x.transpose(0, 1).contiguous().transpose(0, 1) if x is not None and x.dim() > 1 else x
            for x in args
        ]
        strided, _ = selective_scan(*turned)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.15)
    torch.testing.assert_close(strided, expected)


def test_the_kernel_keeps_one_state_in_64() -> None:
    if reason := selective_scan.implementations["cpp"][1](*arguments(1, 1, 1, 1)):
        pytest.skip(reason)
    args = [x.contiguous() if x is not None else None for x in arguments(1, 640, 4, 16)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        with selective_scan.using("cpp"):
            selective_scan(*args)
    largest = max(t.numel() for t in saved)
    assert largest <= 640 * 16, "the states of all places would be 640 * 4 * 16 numbers"
    assert sum(t.numel() for t in saved) < 640 * 4 * 16 + 8 * 640 * 4


def test_it_grows_linearly() -> None:
    """Both ways. Best of several, because the machine may be shared."""

    def seconds(T: int) -> float:
        args = [x.float().detach().requires_grad_() for x in arguments(1, T, 32, 8)[:6]]
        times = []
        with selective_scan.using("reference"):
            for _ in range(3):
                begin = time.perf_counter()
                selective_scan(*args)[0].sum().backward()
                times.append(time.perf_counter() - begin)
        return min(times)

    ratio = seconds(1024) / seconds(256)
    assert ratio < 10, f"4 times the tokens took {ratio:.1f} times as long (quadratic would be 16)"


@pytest.mark.skipif("cpp" not in selective_scan.implementations, reason="needs a compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="tells x86 alone")
def test_a_gradient_that_decays_ends_in_zero() -> None:
    """Of the last state alone: subnormal numbers took twice as long (4,096 tokens)."""
    args = arguments(1, 600, 32, 4)
    found = {}
    for name in ("reference", "cpp"):
        given = [a.detach().float() if a is not None else None for a in args[:6]]
        leaves = [a.requires_grad_() for a in given if a is not None]
        with selective_scan.using(name):
            _, last = selective_scan(*leaves)
        found[name] = torch.autograd.grad(last.sum(), leaves, allow_unused=True)
    tiny = torch.finfo(torch.float32).tiny
    subnormal = lambda x: int(((x != 0) & (x.abs() < tiny)).sum())
    assert subnormal(found["reference"][0]) > 0 == subnormal(found["cpp"][0])
    for expected, mine in zip(found["reference"][:4], found["cpp"][:4], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
