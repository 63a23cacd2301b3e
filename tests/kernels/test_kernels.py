"""Every exact implementation of an Op equals its reference.

Outputs and all gradients, over awkward shapes.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check, dtypes, here, others, randn

import mm.kernels.cross_entropy as cross_entropy
from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.causal_conv import causal_conv
from mm.kernels.cross_entropy import linear_cross_entropy
from mm.kernels.glu import glu
from mm.kernels.grouped_linear import grouped_linear
from mm.kernels.linear_scan import linear_scan
from mm.kernels.op import Op
from mm.kernels.rg_lru import rg_lru_gates
from mm.kernels.rms_norm import rms_norm


@dtypes
@pytest.mark.parametrize("name", others(linear_scan))
@pytest.mark.parametrize(
    "B,T,D",
    [
        (1, 1, 1),
        (2, 3, 5),
        (1, 63, 60),
        (2, 64, 16),
        (3, 65, 7),
        (1, 130, 100),
        (2, 0, 3),
        (0, 4, 3),
    ],
)
@pytest.mark.parametrize("reset", ["never", "some", "always"])
@pytest.mark.parametrize("initial", [False, True])
def test_linear_scan(
    name: str, dtype: torch.dtype, B: int, T: int, D: int, reset: str, initial: bool
) -> None:
    a = randn(B, T, D).sigmoid().to(dtype)
    resets = {
        "never": None,
        "some": torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.2,
        "always": torch.ones(B, T, dtype=torch.bool),
    }[reset]
    check(
        linear_scan,
        name,
        (
            a,
            randn(B, T, D, dtype=dtype),
            resets,
            randn(B, D, dtype=dtype, seed=3) if initial else None,
        ),
        dtype,
    )


forms = pytest.mark.parametrize(
    "form",
    [{"reverse": True}, {"log": True}, {"log": True, "reverse": True}],
    ids=lambda form: "-".join(form),
)


@dtypes
@forms
@pytest.mark.parametrize("name", others(linear_scan))
@pytest.mark.parametrize("B,T,D", [(1, 1, 1), (2, 3, 5), (2, 64, 16), (3, 65, 7), (2, 0, 3)])
@pytest.mark.parametrize("carried", [False, True])
def test_linear_scan_reads_either_way_and_logarithms(
    name: str, dtype: torch.dtype, form: dict[str, bool], B: int, T: int, D: int, carried: bool
) -> None:
    a = randn(B, T, D).sigmoid()
    a = a.log() if "log" in form else a
    cut = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.2
    initial = randn(B, D, dtype=dtype, seed=3)
    rest = (cut, initial) if carried else (None, None)
    check(linear_scan, name, (a.to(dtype), randn(B, T, D, dtype=dtype), *rest), dtype, **form)


@pytest.mark.parametrize("name", here(linear_scan))
def test_linear_scan_forms_are_one_recurrence(name: str) -> None:
    """Reversed = turned around; logarithms = the logarithm, even of what float64 cannot hold."""
    a, b = randn(2, 9, 3).sigmoid().detach(), randn(2, 9, 3, seed=1).exp().detach()
    before, cut = randn(2, 3).exp().detach(), torch.rand(2, 9) < 0.2
    turned = lambda *tensors: [x.flip(1) for x in tensors]
    with linear_scan.using(name):
        h, last = linear_scan(a, b, cut, before)
        back, first = linear_scan(*turned(a, b, cut), before, reverse=True)
        logs, log_last = linear_scan(a.log(), b.log(), cut, before.log(), log=True)
        huge, _ = linear_scan(a.log(), b.log() + 1e4, cut, before.log() + 1e4, log=True)
        none, _ = linear_scan(a.log(), b.log(), None, torch.full_like(before, -torch.inf), log=True)
        plain, _ = linear_scan(a, b)
    torch.testing.assert_close(back.flip(1), h)
    torch.testing.assert_close(first, last)
    torch.testing.assert_close(logs.exp(), h)
    torch.testing.assert_close(log_last.exp(), last)
    torch.testing.assert_close(huge - 1e4, logs)
    torch.testing.assert_close(none.exp(), plain)


@pytest.mark.parametrize("name", here(linear_scan))
def test_linear_scan_takes_any_strides_and_narrow_types(name: str) -> None:
    a, b = randn(2, 5, 8).sigmoid(), randn(2, 5, 8, seed=1)
    with linear_scan.using("reference"):
        expected = linear_scan(a, b)[0]
    with linear_scan.using(name):
        strided = linear_scan(
            a.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((b, b), -1)[..., :8]
        )[0]
        narrow, last = linear_scan(a.bfloat16(), b.bfloat16())
    torch.testing.assert_close(strided, expected)
    assert narrow.dtype == torch.float32 and torch.equal(last, narrow[:, -1])
    torch.testing.assert_close(narrow.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", here(linear_scan))
def test_linear_scan_resets_select_and_do_not_multiply(name: str, log: bool) -> None:
    """The state before a reset may be inf.

    Neither the value nor the gradient of what follows may turn NaN.
    """
    a, b = randn(1, 4, 2).sigmoid().detach(), randn(1, 4, 2).detach()
    b[0, 1] = float("inf")
    a.requires_grad_(), b.requires_grad_()
    with linear_scan.using(name):
        h, _ = linear_scan(a, b, torch.tensor([[True, False, True, False]]), log=log)
    assert h[0, 2:].isfinite().all()
    da, db = torch.autograd.grad(h[0, 2:].sum(), [a, b])
    assert da.isfinite().all() and db.isfinite().all()


def test_linear_scan_grows_linearly() -> None:
    """Both ways: an index loop's backward is quadratic.

    Processor time, best of several, because the machine may be shared.
    """

    def seconds(name: str, T: int) -> float:
        a, b = torch.rand(1, T, 64, requires_grad=True), torch.randn(1, T, 64, requires_grad=True)
        times = []
        with linear_scan.using(name):
            for _ in range(4):
                begin = time.thread_time()
                linear_scan(a, b)[0].sum().backward()
                times.append(time.thread_time() - begin)
        return min(times)

    ratio = seconds("reference", 1024) / seconds("reference", 256)
    assert ratio < 10, f"4 times the tokens took {ratio:.1f} times as long (quadratic would be 16)"


@dtypes
@pytest.mark.parametrize("name", others(attention))
@pytest.mark.parametrize(
    "R,T,S,H,G",
    [(1, 1, 1, 1, 1), (2, 3, 3, 4, 2), (1, 65, 65, 2, 1), (2, 5, 9, 4, 4), (1, 1, 33, 6, 2)],
)
@pytest.mark.parametrize(
    "mask", ["none", "causal", "some", "some and causal", "nothing for a query"]
)
def test_attention(
    name: str, dtype: torch.dtype, R: int, T: int, S: int, H: int, G: int, mask: str
) -> None:
    allowed = None
    if "some" in mask or "nothing" in mask:
        allowed = torch.rand(R, T, S, generator=torch.Generator().manual_seed(2)) < 0.6
        allowed[:, :, 0] = True
    if "nothing" in mask:
        allowed[:, 0] = False
    arguments = (
        randn(R, T, H, 6, dtype=dtype),
        randn(R, S, G, 6, dtype=dtype, seed=1),
        randn(R, S, G, 10, dtype=dtype, seed=2),
        MaskSpec(allowed, causal="causal" in mask),
    )
    check(attention, name, arguments, dtype)


def test_attention_reference_is_softmax_attention() -> None:
    """The reference itself, against the formula written out for one head and one query."""
    q, k, v = randn(1, 3, 2, 4), randn(1, 3, 1, 4, seed=1), randn(1, 3, 1, 5, seed=2)
    with attention.using("reference"):
        y = attention(q, k, v, MaskSpec(causal=True))
    weights = torch.stack([(q[0, 1, 1] * k[0, s, 0]).sum() / 2 for s in range(2)]).softmax(0)
    torch.testing.assert_close(y[0, 1, 1], weights[0] * v[0, 0, 0] + weights[1] * v[0, 1, 0])
    assert torch.equal(y[0, 0, 0], v[0, 0, 0])


def test_attention_bias_and_gain() -> None:
    q, k, v = randn(1, 3, 2, 4), randn(1, 3, 2, 4, seed=1), randn(1, 3, 2, 5, seed=2)
    bias, gain = randn(1, 2, 3, 3, seed=3), randn(1, 2, 3, 3, seed=4)
    p = (torch.einsum("rthk,rshk->rhts", q, k) / 2 + bias).softmax(-1) * gain
    torch.testing.assert_close(
        attention(q, k, v, score=ScoreSpec(bias, gain)), torch.einsum("rhts,rshv->rthv", p, v)
    )


@dtypes
@pytest.mark.parametrize("name", others(rms_norm))
@pytest.mark.parametrize(
    "shape,weight",
    [((3, 7), (7,)), ((2, 1, 60), (60,)), ((2, 5, 3, 8), (8,)), ((1, 1), None), ((0, 4), (4,))],
)
def test_rms_norm(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], weight: tuple[int, ...] | None
) -> None:
    check(
        rms_norm,
        name,
        (randn(*shape, dtype=dtype), randn(*weight, dtype=dtype, seed=1) if weight else None, 1e-5),
        dtype,
    )


@dtypes
@pytest.mark.parametrize("name", others(glu))
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7), (5, 64), (0, 4), (3, 33)])
def test_glu(name: str, dtype: torch.dtype, activation: str, shape: tuple[int, ...]) -> None:
    gate = (randn(*shape) * 4).to(dtype)
    check(glu, name, (gate, randn(*shape, dtype=dtype, seed=1)), dtype, activation=activation)


@dtypes
@pytest.mark.parametrize("name", others(grouped_linear))
@pytest.mark.parametrize(
    "rows,ends",
    [(16, [16]), (48, [0, 16, 16, 48]), (48, [0, 0, 32]), (32, [0, 0]), (0, [0, 0])],
    ids=str,
)
def test_grouped_linear(name: str, dtype: torch.dtype, rows: int, ends: list[int]) -> None:
    """Experts without rows, and rows behind the last end, which are zeros with zero gradients."""
    weight = randn(len(ends), 7, 5, dtype=dtype, seed=1)
    places = torch.tensor(ends, dtype=torch.int32)
    check(grouped_linear, name, (randn(rows, 5, dtype=dtype), weight, places), dtype)


@dtypes
@pytest.mark.parametrize("name", others(causal_conv))
@pytest.mark.parametrize(
    "B,T,D,C",
    [(1, 1, 1, 4), (2, 9, 5, 4), (1, 33, 16, 2), (3, 2, 7, 4), (1, 0, 3, 4), (0, 3, 3, 4)],
)
def test_causal_conv(name: str, dtype: torch.dtype, B: int, T: int, D: int, C: int) -> None:
    document = (
        torch.randint(0, 2, (B, T), generator=torch.Generator().manual_seed(0))
        .cumsum(1)
        .to(torch.int32)
    )
    arguments = (
        randn(B, T, D, dtype=dtype),
        randn(C, D, dtype=dtype, seed=1),
        randn(D, dtype=dtype, seed=2),
        document,
    )
    check(causal_conv, name, arguments, dtype)
    wide = torch.cat(
        (arguments[0], arguments[0] + 1), -1
    )  # a half of a projection: rows with a stride
    check(causal_conv, name, (wide[..., D:].detach(), *arguments[1:]), dtype)


def test_causal_conv_reference_is_a_convolution() -> None:
    u, w, bias = randn(2, 7, 3), randn(4, 3, seed=1), randn(3, seed=2)
    with causal_conv.using("reference"):
        y = causal_conv(u, w, bias, torch.ones(2, 7, dtype=torch.int32))
    expected = F.conv1d(F.pad(u.transpose(1, 2), (3, 0)), w.T[:, None], bias, groups=3).transpose(
        1, 2
    )
    torch.testing.assert_close(y, expected)


@dtypes
@pytest.mark.parametrize("name", others(rg_lru_gates))
@pytest.mark.parametrize("H,R,K", [(1, 1, 1), (2, 5, 3), (4, 33, 16), (1, 0, 4)])
@pytest.mark.parametrize(
    "rate", [1e-4, 0.05, 1.0, 20.0], ids=["a near 1", "usual", "fast", "a near 0"]
)
def test_rg_lru_gates(name: str, dtype: torch.dtype, H: int, R: int, K: int, rate: float) -> None:
    rates = (randn(H * K, seed=2).abs() * rate + rate / 10).to(dtype).detach().requires_grad_()
    arguments = (
        randn(H, R, 2 * K, dtype=dtype),
        randn(H, 2 * K, dtype=dtype, seed=1),
        rates,
        randn(R, H * K, dtype=dtype, seed=3),
    )
    if (
        rate == 1e-4 and dtype == torch.float32
    ):  # d b / d rate grows like rate ** -0.5: compare it on its own scale
        arguments = (*arguments[:3], arguments[3].detach() * 0.05)
    check(rg_lru_gates, name, arguments, dtype)


@pytest.mark.parametrize("op,kernel", [(rms_norm, "cpp"), (glu, "cpp")], ids=["rms_norm", "glu"])
def test_slices_and_narrow_types(op: Op, kernel: str) -> None:
    """Heads cut out of a wider projection, halves of a gated one, bf16 with fp32 beside it.

    Extreme values stay what they are.
    """
    x = randn(2, 3, 5, 8)
    heads, half = x[:, :, 1:3], x[..., :4]
    second = randn(4, seed=1) if op is rms_norm else x[..., 4:]
    calls = [
        (half, second),
        (heads, randn(8, seed=1) if op is rms_norm else x[:, :, 3:]),
        (half.transpose(0, 1), second if op is rms_norm else x[..., 4:].transpose(0, 1)),
    ]
    for arguments in calls:
        if reason := op.implementations[kernel][1](*arguments):
            pytest.skip(reason)
        check(op, kernel, tuple(a.detach() for a in arguments), torch.float64)
        results = []
        for name in ("reference", kernel):
            with op.using(name):
                y = op(*arguments)
                results.append((y, *torch.autograd.grad(y.square().sum(), [x])))
                narrow = op(arguments[0].bfloat16(), arguments[1].float())
            assert narrow.dtype == torch.bfloat16
            torch.testing.assert_close(narrow.double(), y, rtol=0.03, atol=0.03)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    edge = torch.tensor([[-200.0, -90.0, -0.0, 90.0, 200.0, float("nan")]], dtype=torch.bfloat16)
    with op.using("reference"):
        expected = op(edge, torch.ones(6) if op is rms_norm else torch.ones(1, 6))
    with op.using(kernel):
        torch.testing.assert_close(
            op(edge, torch.ones(6) if op is rms_norm else torch.ones(1, 6)),
            expected,
            equal_nan=True,
        )


def test_rms_norm_reference_is_torch_s() -> None:
    x, w = randn(3, 4, 6), randn(6, seed=1)
    with rms_norm.using("reference"):
        torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (6,), w, 1e-5))


@dtypes
@pytest.mark.parametrize("name", others(linear_cross_entropy))
@pytest.mark.parametrize("P,D,N", [(1, 1, 2), (0, 3, 5), (5, 4, 7), (65, 16, 33), (130, 8, 100)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [1024, 32], ids=["one chunk", "chunks of 32"])
def test_linear_cross_entropy(
    name: str,
    dtype: torch.dtype,
    P: int,
    D: int,
    N: int,
    bias: bool,
    classes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_classes", lambda places, n, _: min(n, classes))
    target = torch.randint(N, (P,), generator=torch.Generator().manual_seed(0))
    arguments = (
        randn(P, D, dtype=dtype),
        randn(N, D, dtype=dtype, seed=1),
        target,
        randn(N, dtype=dtype, seed=2) if bias else None,
    )
    check(linear_cross_entropy, name, arguments, dtype)


def test_linear_cross_entropy_reference_is_torch_s() -> None:
    h, w, target = randn(5, 4), randn(7, 4, seed=1), torch.tensor([0, 6, 3, 3, 1])
    with linear_cross_entropy.using("reference"):
        torch.testing.assert_close(
            linear_cross_entropy(h, w, target).mean(), F.cross_entropy(h @ w.T, target)
        )


def test_autocast_decides_the_dtype_of_the_logits() -> None:
    h, w, target = (
        torch.randn(9, 32, requires_grad=True),
        torch.randn(20, 32, requires_grad=True),
        torch.arange(9),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = []
        for name in ("reference", "chunked"):
            with linear_cross_entropy.using(name):
                nll = linear_cross_entropy(h, w, target)
            assert nll.dtype == torch.float32
            results.append((nll, *torch.autograd.grad(nll.sum(), [h, w])))
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
