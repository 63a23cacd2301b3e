"""The interpreter is an oracle: what Triton's own gets wrong comes out as a GPU would have it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton_oracle import built, interpreted, recorded  # noqa: E402


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _compose(a, b, c, d):
    return c * a, c * b + d


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    out = _double(x) * y - tl.where(x > y, x, -y)
    tl.store(out_ptr + i, out)


@triton.jit
def _narrow(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + i[None, :])
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * N + i[None, :], c)


@triton.jit
def _recurrence(a_ptr, b_ptr, h_ptr, last_ptr, T: tl.constexpr, D: tl.constexpr):
    at = tl.arange(0, T)[:, None] * D + tl.arange(0, D)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    _, h = tl.associative_scan((a, b), 0, _compose)
    _, last = tl.reduce((a, b), 0, _compose)
    tl.store(h_ptr + at, h)
    tl.store(last_ptr + tl.arange(0, D), last)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])
@triton.jit
def _sum(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(n, BLOCK)):
        i = start * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def _spilling(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    y = tl.dot(x, x)
    tl.store(out_ptr + at, tl.dot(y.to(tl.bfloat16), x) + y)


def test_bf16_arithmetic_and_comparison_round_as_torch_does():
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty_like(x)
    with interpreted():
        _arithmetic[(1,)](x, y, out, 64)
    assert torch.equal(out, (x + x) * y - torch.where(x > y, x, -y))


def test_bf16_rounds_to_nearest_even():
    x = torch.cat(
        (torch.randn(1018), torch.tensor([0.0, -0.0, 1e-40, 3.4e38, torch.inf, torch.nan]))
    )
    out = torch.empty(1024, dtype=torch.bfloat16)
    with interpreted():
        _narrow[(1,)](x, out, 1024)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_dot_sees_bf16_values_and_tf32_operands():
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    out, tf32, exact = torch.empty(3, 32, 32)
    with interpreted():
        _product[(1,)](a.bfloat16(), b.bfloat16(), out, 32, 64, None)
        _product[(1,)](a, b, tf32, 32, 64, "tf32")
        _product[(1,)](a, b, exact, 32, 64, "ieee")
    torch.testing.assert_close(out, a.bfloat16().float() @ b.bfloat16().float())
    torch.testing.assert_close(exact, a @ b)
    error = (tf32 - a @ b).abs().max()
    assert 1e-4 < error < 3e-2, "an operand of 10 bits"


def test_dot_refuses_the_depth_that_the_gpu_refuses():
    a = torch.randn(16, 8)
    with interpreted(), pytest.raises(InterpreterError):
        _product[(1,)](a, a.T.contiguous(), torch.empty(16, 16), 16, 8, "ieee")


def test_scan_and_reduction_are_the_recurrence():
    a, b = torch.rand(2, 32, 8, dtype=torch.float32)
    h, last = torch.empty(32, 8), torch.empty(8)
    with interpreted():
        _recurrence[(1,)](a, b, h, last, 32, 8)
    expected = [torch.zeros(8)]
    for decay, new in zip(a, b, strict=True):
        expected.append(decay * expected[-1] + new)
    torch.testing.assert_close(h, torch.stack(expected[1:]))
    torch.testing.assert_close(last, expected[-1])


@triton.jit
def _count(x, places, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out + tl.load(places + i), tl.load(x + i), mask=i != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomics_add_what_meets_at_one_place(dtype):
    places = torch.tensor([0, 2, 2, 1, 2, 1, 0, 2])
    x, out = torch.randn(8).to(dtype), torch.zeros(3, dtype=dtype)
    expected = torch.zeros(3).index_add(0, places[1:], x[1:].float())
    with interpreted():
        _count[(1,)](x, places, out, 8)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-6)


def test_autotuned_kernel_runs_a_loop_of_unknown_length():
    x, out = torch.randn(100), torch.zeros(1)
    with interpreted():
        _sum[(1,)](x, out, 100)
    torch.testing.assert_close(out[0], x.sum())


@pytest.mark.slow
def test_binaries_for_hopper_are_read_before_and_after_interpreting():
    with recorded() as launches:
        x = torch.empty(128, 128, dtype=torch.bfloat16)
        _product[(1,)](x, x, x.float(), 128, 128, None, num_warps=4)
        _sum[(1,)](torch.empty(100), torch.empty(1), 100)
        _spilling[(1,)](x, x.float(), 128, num_warps=1)
    assert [one.kernel.__name__ for one in launches] == ["_product", "_sum", "_sum", "_spilling"]
    product, plain, _, spilling = map(built, launches)
    assert product.check(dot=True).wgmma > 0
    with pytest.raises(AssertionError, match="no matrix instruction"):
        plain.check(dot=True)
    plain.check()
    with pytest.raises(AssertionError, match="spills"):
        spilling.check()
