"""Triton kernels of the scan family: equal to their references in the interpreter, built for sm_90.

Small tiles stand for the real ones where a test says so: a carry crosses tiles after a few places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_oracle import built, interpreted, recorded  # noqa: E402

import mm.kernels.selective_scan as selective  # noqa: E402
from mm.kernels import parts_triton as parts_gpu  # noqa: E402
from mm.kernels.causal_conv import causal_conv  # noqa: E402
from mm.kernels.causal_conv import conv_triton as conv_gpu  # noqa: E402
from mm.kernels.complex_scan import complex_scan  # noqa: E402
from mm.kernels.complex_scan import scan_triton as complex_gpu  # noqa: E402
from mm.kernels.diagonal_ssm import diagonal_ssm  # noqa: E402
from mm.kernels.diagonal_ssm import ssm_triton as ssm_gpu  # noqa: E402
from mm.kernels.glu import glu, glu_halves  # noqa: E402
from mm.kernels.glu import glu_triton as glu_gpu  # noqa: E402
from mm.kernels.linear_scan import linear_scan  # noqa: E402
from mm.kernels.linear_scan import scan_triton as linear_gpu  # noqa: E402
from mm.kernels.op import Op  # noqa: E402
from mm.kernels.rg_lru import gates_triton as gates_gpu  # noqa: E402
from mm.kernels.rg_lru import rg_lru_gates  # noqa: E402
from mm.kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from mm.kernels.rms_norm import norm_triton as norm_gpu  # noqa: E402
from mm.kernels.rotary import norm_rotary, rotary  # noqa: E402
from mm.kernels.rotary import rotary_triton as rotary_gpu  # noqa: E402
from mm.kernels.selective_scan import scan_triton as selective_gpu  # noqa: E402
from mm.kernels.selective_scan import segments_triton as segments_gpu  # noqa: E402
from mm.kernels.selective_scan import selective_scan  # noqa: E402

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
            loss = sum(
                (o.double() * torch.arange(o.numel()).sin().view(o.shape)).sum() for o in outs
            )
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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16: a few places and channels cross their borders."""
    for module in (linear_gpu, complex_gpu, ssm_gpu, conv_gpu):
        monkeypatch.setattr(module, "TOKENS", 16)
    for module in (linear_gpu, complex_gpu, ssm_gpu, conv_gpu, selective_gpu, gates_gpu):
        monkeypatch.setattr(module, "CHANNELS", 16)
    monkeypatch.setattr(parts_gpu, "PARTS", 2)
    monkeypatch.setattr(selective, "EVERY", 16)
    monkeypatch.setattr(gates_gpu, "TOKENS", 16)
    monkeypatch.setattr(glu_gpu, "BLOCK", 64)
    monkeypatch.setattr(norm_gpu, "ELEMENTS", 64)
    monkeypatch.setattr(norm_gpu, "PROGRAMS", 3)


lengths = pytest.mark.parametrize(
    "T,dtype",
    [(1, torch.float32), (3, torch.float32), (37, torch.float32), (37, torch.bfloat16)],
    ids=["1-fp32", "3-fp32", "37-fp32", "37-bf16"],
)


@lengths
def test_linear_scan(T: int, dtype: torch.dtype, small: None) -> None:
    torch.manual_seed(T)
    a, b = torch.rand(2, T, 20), torch.randn(2, T, 20)
    compare(linear_scan, (a, b), dtype)
    compare(linear_scan, (a, b, resets(2, T), torch.randn(2, 20)), dtype)
    compare(linear_scan, (a, b, resets(2, T), torch.randn(2, 20)), dtype, reverse=True)


@lengths
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_of_logarithms(T: int, dtype: torch.dtype, reverse: bool, small: None) -> None:
    torch.manual_seed(T)
    a, b = torch.rand(2, T, 20).log(), torch.randn(2, T, 20)
    compare(linear_scan, (a, b), dtype, log=True, reverse=reverse)
    carried = (resets(2, T), torch.randn(2, 20))
    compare(linear_scan, (a, b, *carried), dtype, log=True, reverse=reverse)


@pytest.mark.parametrize("log", [False, True])
def test_linear_scan_forgets_an_infinite_document(log: bool) -> None:
    a, b = torch.full((1, 6, 2), 0.5), torch.ones(1, 6, 2)
    b[0, 1] = torch.inf
    with interpreted(), linear_scan.using("triton"):
        h, last = linear_scan(a, b, torch.tensor([[1, 0, 0, 1, 0, 0]]).bool(), log=log)
    assert last.isfinite().all() and torch.equal(h[0, 3], torch.ones(2))


@lengths
def test_complex_scan(T: int, dtype: torch.dtype, small: None) -> None:
    torch.manual_seed(T)
    a, b = torch.randn(2, T, 36) / 2, torch.randn(2, T, 36)
    compare(complex_scan, (a, b, resets(2, T), torch.randn(2, 36)), dtype)
    compare(complex_scan, (torch.randn(36) / 3, b, resets(2, T), torch.randn(2, 36)), dtype)
    compare(complex_scan, (torch.randn(36) / 3, b), dtype)
    if dtype == torch.float32:
        compare(complex_scan, (a, b, resets(2, T), torch.randn(2, 36)), dtype, reverse=True)


@lengths
def test_diagonal_ssm(T: int, dtype: torch.dtype, small: None) -> None:
    torch.manual_seed(T)
    u, a, c = torch.randn(2, T, 18), torch.randn(2, 18, 2) / 2, torch.randn(2, 18, 2)
    compare(diagonal_ssm, (u, a, c), dtype)
    carried = (resets(2, T), torch.randn(2, 2, 18, 2), torch.tensor([T, T // 2]))
    compare(diagonal_ssm, (u, a, c, *carried), dtype)


@lengths
def test_selective_scan(T: int, dtype: torch.dtype, small: None) -> None:
    torch.manual_seed(T)
    u, dt = torch.randn(2, T, 20), torch.rand(2, T, 20)
    a, skip = -torch.rand(3, 20) * 4, torch.randn(20)
    b, c = torch.randn(2, 2, T, 3)
    compare(selective_scan, (u, dt, a, b, c, skip), dtype)
    compare(selective_scan, (u, dt, a, b, c, skip, resets(2, T), torch.randn(2, 3, 20)), dtype)


def test_selective_scan_in_segments(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the reference where time is cut, the last segment and stretch shorter or not."""
    T = 53
    u, dt, b, c = torch.randn(2, T, 18), torch.rand(2, T, 18), *torch.randn(2, 2, T, 2)
    a, skip, initial = -torch.rand(2, 18) * 4 - 0.1, torch.randn(18), torch.randn(2, 2, 18)
    reset = resets(2, T)
    reset[0, 32] = True  # a document begins with a segment
    dt[1, ::9] = 1e4  # decays of exactly 0
    for shortest, count, given in ((1, 4, (reset, initial)), (3, 2, (None, initial))):
        monkeypatch.setattr(segments_gpu, "SHORTEST", shortest)
        assert segments_gpu.plan(4, T, 16, selective_gpu.BACKWARD_PROGRAMS)[0] == count
        compare(selective_scan, (u, dt / 9, a, b, c, skip, *given), torch.float32)


def test_a_segment_forgets_what_is_infinite(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_gpu, "SHORTEST", 1)
    u, dt, reset = torch.ones(1, 64, 16), torch.ones(1, 64, 16), torch.zeros(1, 64).bool()
    a, b, skip = -torch.ones(2, 16), torch.ones(1, 64, 2), torch.ones(16)
    u[0, 3], reset[0, 9], found = torch.inf, True, []
    for programs in (1, 4):
        monkeypatch.setattr(selective_gpu, "FORWARD_PROGRAMS", programs)
        with interpreted(), selective_scan.using("triton"):
            y, last = selective_scan(u, dt, a, b, b, skip, reset)
        assert y[0, 3:9].isinf().all() and y[0, 9:].isfinite().all() and last.isfinite().all()
        found.append(y[0, 9:])
    torch.testing.assert_close(*found)


@lengths
def test_causal_conv(T: int, dtype: torch.dtype, small: None) -> None:
    torch.manual_seed(T)
    document = resets(2, T).cumsum(1).int()
    compare(
        causal_conv, (torch.randn(2, T, 20), torch.randn(4, 20), torch.randn(20), document), dtype
    )


@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu(activation: str, dtype: torch.dtype, small: None) -> None:
    x = 3 * torch.randn(3, 5, 14)
    compare(glu, (x[..., :7], x[..., 7:], activation), dtype)
    compare(glu_halves, (x, activation), dtype)
    compare(glu_halves, (x[:, 1:, :6], activation), dtype)


@dtypes
@pytest.mark.parametrize("D", [3, 100])
def test_rms_norm(D: int, dtype: torch.dtype, small: None) -> None:
    x = torch.randn(2, 5, 4, D)
    compare(rms_norm, (x, torch.randn(D)), dtype)
    compare(rms_norm, (x[:, :, 1:3],), dtype, eps=1e-2)


@dtypes
@pytest.mark.parametrize("D", [3, 100])
def test_add_rms_norm(D: int, dtype: torch.dtype, small: None) -> None:
    x, branch = torch.randn(2, 2, 9, D)
    compare(add_rms_norm, (x, branch, torch.randn(D)), dtype)
    compare(add_rms_norm, (x.transpose(0, 1), branch.transpose(0, 1)), dtype, eps=1e-2)


@pytest.mark.parametrize("used", ["sum", "norm", "both"])
@pytest.mark.parametrize(
    "kinds",
    [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2],
    ids=["fp32", "bf16 branch", "bf16"],
)
def test_a_sum_and_its_norm_are_those_of_two_ops(
    kinds: tuple[torch.dtype, torch.dtype], used: str, small: None
) -> None:
    """Same dtypes, the sum bit for bit, no result less exact; one gradient if one dtype."""
    torch.manual_seed(0)
    leaves = [torch.randn(5, 100).to(kind).requires_grad_() for kind in kinds]
    leaves.append(torch.randn(100, requires_grad=True))
    weights, found = torch.randn(2, 5, 100), []
    for way in ("apart", "triton", "reference"):
        given = [x.double() if way == "reference" else x for x in leaves]
        with interpreted(), add_rms_norm.using(way):
            outs = add_rms_norm(*given)
        pairs = zip(outs, weights, ("sum", "norm"), strict=True)
        losses = [(o * w).double().sum() for o, w, name in pairs if used in (name, "both")]
        with interpreted():
            grads = torch.autograd.grad(losses, given, materialize_grads=True)
        found.append((*outs, *grads))
    assert torch.equal(found[0][0], found[1][0])
    for apart, got, exact in zip(*found, strict=True):
        assert got.dtype == apart.dtype
        with torch.no_grad():
            errors = [float((x.double() - exact).norm()) for x in (got, apart)]
            assert errors[0] <= 1.01 * errors[1] + 1e-6 * float(exact.norm())
    assert (found[1][2] is found[1][3]) == (kinds[0] == kinds[1])


@dtypes
@pytest.mark.parametrize("P", [3, 4, 7])
def test_rotary(P: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole and of part of each head, also of heads of a wider tensor; normed before or not."""
    monkeypatch.setattr(rotary_gpu, "ELEMENTS", 32)
    x, angle = torch.randn(2, 5, 4, 14, requires_grad=True), 9 * torch.randn(2, 5, 1, P)
    table = torch.stack((angle.cos(), angle.sin()))
    scale = torch.randn(14, requires_grad=True)
    for normed in (False, True):
        op, leaves = (norm_rotary, (x, scale)) if normed else (rotary, (x,))
        for given in (x, x[:, :, 1:3], x.transpose(1, 2).contiguous().transpose(1, 2)):
            results = []
            for name, kind in (("reference", torch.float64), ("triton", dtype)):
                rest = (scale.to(kind), table, 1e-2) if normed else (table,)
                with interpreted(), op.using(name):
                    y = op(given.to(dtype).to(kind), *rest)
                    weights = torch.arange(y.numel()).sin().view(y.shape)
                    total = (y.double() * weights).sum()
                    results.append((y, *torch.autograd.grad(total, leaves)))
            assert results[1][0].dtype == dtype
            for wide, narrow in zip(*results, strict=True):
                error = (narrow.double() - wide).norm() / wide.norm()
                assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@dtypes
@pytest.mark.parametrize("R", [1, 37])
def test_rg_lru_gates(R: int, dtype: torch.dtype, small: None) -> None:
    gates, bias, u = torch.randn(2, R, 36), torch.randn(2, 36), torch.randn(R, 36)
    rate = torch.logspace(-3, 1, 36)  # a from 1 - 1e-4 to 1e-4
    compare(rg_lru_gates, (gates, bias, rate, u), dtype)


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call with its backward launches, each built and checked."""
    with recorded() as asked:
        out = call()
        outs = out if isinstance(out, tuple) else (out,)
        sum(o.float().sum() for o in outs).backward()
    return [built(launch).check().name for launch in asked]


def _calls(dtype: torch.dtype) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """A call of every op at sizes of a real model."""
    wide = lambda *shape: torch.empty(*shape, dtype=dtype, requires_grad=True)
    full = lambda *shape: torch.empty(*shape, requires_grad=True)
    reset, document = torch.empty(2, 2048).bool(), torch.empty(2, 2048).int()
    x, state, length = wide(2, 2048, 1024), full(2, 1024), torch.empty(2).long()
    selective = (x, x, full(16, 1024), *[wide(2, 2048, 16) for _ in "bc"], full(1024))
    return {
        "linear_scan": (linear_scan, (x, x, reset, state)),
        "linear_scan_reversed": (partial(linear_scan, reverse=True), (x, x, reset, state)),
        "linear_scan_logs": (partial(linear_scan, log=True), (x, x, reset, state)),
        "complex_scan": (complex_scan, (x, x, reset, state)),
        "complex_scan_reversed": (partial(complex_scan, reverse=True), (x, x, reset, state)),
        "constant_scan": (complex_scan, (full(1024), x, reset, state)),
        "diagonal_ssm": (
            diagonal_ssm,
            (x, full(2, 1024, 32), full(2, 1024, 32), reset, full(2, 2, 1024, 32), length),
        ),
        "selective_scan": (selective_scan, (*selective, reset, full(2, 16, 1024))),
        "causal_conv": (causal_conv, (x, full(4, 1024), full(1024), document)),
        "silu": (glu, (x, x)),
        "gelu": (glu, (x, x, "gelu_tanh")),
        "silu_halves": (glu_halves, (x,)),
        "rms_norm": (rms_norm, (x, full(1024))),
        "rms_norm_heads": (rms_norm, (wide(2, 2048, 8, 128), full(128))),
        "rotary": (rotary, (wide(2, 2048, 8, 128), torch.empty(2, 2, 2048, 1, 64))),
        "rotary_part": (rotary, (wide(2, 2048, 8, 96), torch.empty(2, 2, 2048, 1, 20))),
        "norm_rotary": (
            norm_rotary,
            (wide(2, 2048, 8, 128), full(128), torch.empty(2, 2, 2048, 1, 64)),
        ),
        "norm_rotary_part": (
            norm_rotary,
            (wide(2, 2048, 8, 256), full(256), torch.empty(2, 2, 2048, 1, 32)),
        ),
        "add_rms_norm": (add_rms_norm, (x, x, full(1024))),
        "rms_norm_wide": (rms_norm, (wide(2, 64, 8192), full(8192))),
        "rg_lru_gates": (
            rg_lru_gates,
            (wide(8, 4096, 256), full(8, 256), full(1024), wide(4096, 1024)),
        ),
    }


def build(name: str, dtype: torch.dtype) -> None:
    op, arguments = _calls(dtype)[name]
    with getattr(op, "func", op).using("triton"):
        found = launches(lambda: op(*arguments))
    if op is rotary:  # its gradient is the rotation back
        assert found == ["_rotate"] * 2
    else:
        sums = found.count("_sum_parts")
        kernels = [x for x in found if x not in ("_ends", "_sum_parts")]
        assert kernels == ["_forward"] * (len(kernels) - 1) + ["_backward"]
        assert found[len(found) - sums :] == ["_sum_parts"] * sums


def test_a_kernel_is_built_for_hopper() -> None:
    build(next(iter(_calls(torch.bfloat16))), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", _calls(torch.bfloat16))
def test_kernels_are_built_for_hopper(name: str, dtype: torch.dtype) -> None:
    build(name, dtype)


def test_a_wrong_kernel_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, small: None
) -> None:
    monkeypatch.setenv("MM_SELF_CHECK", "1")
    monkeypatch.setattr(linear_scan, "_checked", {})
    right = linear_gpu.backward

    def wrong(*tensors: Tensor) -> None:
        right(*tensors)
        tensors[-3].mul_(1.01)  # the gradient of a

    a, b = torch.rand(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    with interpreted():
        assert linear_scan.pick(a, b) == "triton"
        linear_scan(a, b)
        assert not caplog.records and linear_scan._checked.popitem()[1] == "triton"
        monkeypatch.setattr(linear_gpu, "backward", wrong)
        linear_scan(a, b)
        assert linear_scan._checked.popitem()[1] != "triton"
    assert "triton IS WRONG HERE AND IS NOT USED: gradient of a_BTD differs" in caplog.text


def test_a_triton_op_compiles_whole(small: None) -> None:
    a, b = torch.rand(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    with interpreted():
        assert linear_scan.pick(a, b) == "triton"
        compiled = torch.compile(lambda *x: linear_scan(*x)[0], fullgraph=True, backend="aot_eager")
        got, expected = compiled(a, b), linear_scan(a, b)[0]
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(h.square().sum(), a)[0] for h in (got, expected)]
    torch.testing.assert_close(*grads)
