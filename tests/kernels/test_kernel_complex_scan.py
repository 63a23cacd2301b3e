"""The complex scan and the diagonal state space kernel equal their references.

In outputs and all gradients; and they grow linearly.
"""

from __future__ import annotations

import time

import pytest
import torch
from kernel_checks import check, dtypes, here, others, randn
from torch import Tensor

from mm.kernels.complex_scan import complex_scan
from mm.kernels.diagonal_ssm import diagonal_ssm


def inside(*shape: int) -> Tensor:
    """Decays of size below 1: `(..., 2W)`."""
    x = randn(*shape, seed=5).detach()
    size = x.chunk(2, -1)[0].sigmoid()
    angle = x.chunk(2, -1)[1]
    return torch.cat((size * angle.cos(), size * angle.sin()), -1)


def resets(B: int, T: int, kind: str) -> Tensor | None:
    return {
        "never": None,
        # documents of 1, 1, many and 1 tokens
        "ragged": (torch.arange(T) <= 2).logical_or(torch.arange(T) == T - 1).expand(B, T),
        "always": torch.ones(B, T, dtype=torch.bool),
    }[kind]


SIZES = [(1, 1), (2, 3), (1, 63), (2, 64), (3, 65), (1, 130), (2, 0), (0, 4)]


@dtypes
@pytest.mark.parametrize("name", others(complex_scan))
@pytest.mark.parametrize("B,T", SIZES)
@pytest.mark.parametrize("reset", ["never", "ragged", "always"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_complex_scan(
    name: str, dtype: torch.dtype, B: int, T: int, reset: str, initial: bool, constant: bool
) -> None:
    D = 14
    a = (inside(D) if constant else inside(B, T, D)).to(dtype)
    before = randn(B, D, dtype=dtype, seed=3) if initial else None
    b = randn(B, T, D, dtype=dtype)
    check(complex_scan, name, (a, b, resets(B, T, reset), before), dtype)


@dtypes
@pytest.mark.parametrize("name", others(complex_scan))
@pytest.mark.parametrize("B,T", [(1, 1), (2, 3), (3, 65)])
@pytest.mark.parametrize("constant", [False, True])
def test_complex_scan_reversed(
    name: str, dtype: torch.dtype, B: int, T: int, constant: bool
) -> None:
    a = (inside(14) if constant else inside(B, T, 14)).to(dtype)
    b, before = randn(B, T, 14, dtype=dtype), randn(B, 14, dtype=dtype, seed=3)
    check(complex_scan, name, (a, b, resets(B, T, "ragged"), before), dtype, reverse=True)
    with complex_scan.using(name):
        back, _ = complex_scan(a, b, None, before, reverse=True)
        h, _ = complex_scan(a if constant else a.flip(1), b.flip(1), None, before)
    torch.testing.assert_close(back.flip(1), h)


@pytest.mark.parametrize("name", here(complex_scan))
@pytest.mark.parametrize("constant", [False, True])
def test_complex_scan_is_the_recurrence_of_complex_numbers(name: str, constant: bool) -> None:
    W = 3
    a = inside(2 * W) if constant else inside(2, 9, 2 * W)
    b, before = randn(2, 9, 2 * W).detach(), randn(2, 2 * W, seed=1).detach()
    pair = lambda x: torch.complex(*x.chunk(2, -1))
    h, decay = pair(before), pair(a).expand(2, 9, W)
    with complex_scan.using(name):
        got = pair(complex_scan(a, b, None, before)[0])
    for t in range(9):
        h = decay[:, t] * h + pair(b)[:, t]
        torch.testing.assert_close(got[:, t], h)


@dtypes
@pytest.mark.parametrize("name", others(diagonal_ssm))
@pytest.mark.parametrize("B,T", SIZES)
@pytest.mark.parametrize("reset", ["never", "ragged", "always"])
@pytest.mark.parametrize("served", [False, True], ids=["whole", "state and lengths"])
def test_diagonal_ssm(
    name: str, dtype: torch.dtype, B: int, T: int, reset: str, served: bool
) -> None:
    D, N = 11, 5
    a = torch.stack(inside(D, 2 * N).chunk(2, -1)).to(dtype)
    before = randn(B, 2, D, N, dtype=dtype, seed=3) if served else None
    length = torch.tensor([T, 0, T // 2][:B]) if served else None
    u, c = randn(B, T, D, dtype=dtype), randn(2, D, N, dtype=dtype, seed=1)
    check(diagonal_ssm, name, (u, a, c, resets(B, T, reset), before, length), dtype)


@pytest.mark.parametrize("op", [complex_scan, diagonal_ssm])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_resets_select_and_do_not_multiply(op, name: str) -> None:
    """A state of inf before a reset turns neither the value nor the input's gradient NaN."""
    u = randn(1, 4, 6).detach()
    u[0, 1] = float("inf")
    u.requires_grad_()
    reset = torch.tensor([[True, False, True, False]])
    decays = inside(6) if op is complex_scan else inside(2, 6, 4)
    rest = () if op is complex_scan else (randn(2, 6, 4).detach(),)
    arguments = (decays, u) if op is complex_scan else (u, decays)
    if op.implementations[name][1](*arguments, *rest, reset):
        pytest.skip("needs a C++ compiler (install g++)")
    with op.using(name):
        y, _ = op(*arguments, *rest, reset)
    assert y[0, 2:].isfinite().all()
    assert torch.autograd.grad(y[0, 2:].sum(), u)[0].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_diagonal_ssm_grows_linearly(name: str) -> None:
    """Both ways: an index loop's backward is quadratic.

    Best of several, because the machine may be shared.
    """

    def seconds(T: int) -> float:
        u = torch.randn(1, T, 16, requires_grad=True)
        a, c = inside(2, 16, 8).float().requires_grad_(), torch.randn(2, 16, 8)
        times = []
        with diagonal_ssm.using(name):
            for _ in range(4):
                begin = time.perf_counter()
                diagonal_ssm(u, a, c)[0].sum().backward()
                times.append(time.perf_counter() - begin)
        return min(times)

    if diagonal_ssm.implementations[name][1](torch.zeros(1), torch.zeros(1), torch.zeros(1)):
        pytest.skip("needs a C++ compiler (install g++)")
    ratio = seconds(1024) / seconds(256)
    assert ratio < 10, f"4 times the tokens took {ratio:.1f} times as long (quadratic would be 16)"
