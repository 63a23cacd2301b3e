"""Cross-entropy with its settings against the formulas, its memory, and its Triton passes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import mm.kernels.cross_entropy as cross_entropy
from mm.kernels import compiler
from mm.kernels.cross_entropy import linear_cross_entropy, rows_cpp
from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.plan.tally import Measure
from mm.registry import HEADS

SETTINGS: list[dict[str, Any]] = [
    {},
    {"z_loss": 0.1},
    {"softcap": 2.0, "z_loss": 0.2, "ignore_index": -100},
]


def results(
    name: str, sizes: tuple[int, int, int], dtype: torch.dtype, more: bool, **settings: Any
) -> list[Tensor]:
    """Losses and gradients of all that has one; ``more``: with bias and factors."""
    P, D, N = sizes
    shapes = [(P, D), (N, D), (N,), (P,)][: 4 if more else 2]
    leaves = [randn(*s, seed=i).detach().to(dtype).requires_grad_() for i, s in enumerate(shapes)]
    target = torch.randint(N, (P,), generator=torch.Generator().manual_seed(0))
    if "ignore_index" in settings:
        target[::3] = settings["ignore_index"]
    h, weight, bias, factor = (*leaves, None, None)[:4]
    with linear_cross_entropy.using(name):
        y = linear_cross_entropy(h, weight, target, bias, factor_P=factor, **settings)
    return [y, *torch.autograd.grad((y.double() * randn(P, seed=9).detach()).sum(), leaves)]


@pytest.mark.parametrize("classes", [1000, 32], ids=["one chunk", "chunks of 32"])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (0, 3, 5), (65, 16, 133)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("more", [False, True])
def test_settings(
    classes: int,
    sizes: tuple[int, int, int],
    settings: dict[str, Any],
    more: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_classes", lambda places, n, _: min(n, classes))
    expected = results("reference", sizes, torch.float64, more, **settings)
    for name in ("chunked", "cpp") if compiler.load(rows_cpp.SOURCE)[0] else ("chunked",):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
            got = results(name, sizes, dtype, more, **settings)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("classes", [1000, 32], ids=["one chunk", "chunks of 32"])
def test_cpp_in_bf16(classes: int, more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are read and gradients written in the dtype of the products; threads change no bit."""
    if reason := compiler.why_not(rows_cpp.SOURCE):
        pytest.skip(reason)
    monkeypatch.setattr(cross_entropy, "chunk_classes", lambda places, n, _: min(n, classes))
    monkeypatch.setattr(rows_cpp, "SERIAL", 0)
    sizes, dtype = (65, 16, 133), torch.bfloat16
    expected = results("reference", sizes, dtype, more, z_loss=0.1)
    got = results("cpp", sizes, dtype, more, z_loss=0.1)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        error = (a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt()
        assert error < 1e-2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5 - before)
        again = results("cpp", sizes, dtype, more, z_loss=0.1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_the_reference_is_the_formula() -> None:
    h, w, target = randn(3, 4), randn(5, 4, seed=1), torch.tensor([4, -1, 0])
    factor = torch.tensor([2.0, 1.0, 0.5]).double()
    with linear_cross_entropy.using("reference"):
        got = linear_cross_entropy(
            h, w, target, factor_P=factor, ignore_index=-1, z_loss=0.3, softcap=1.5
        )
    logits = 1.5 * (h @ w.T / 1.5).tanh()
    z = logits.exp().sum(-1).log()
    loss = lambda p, t: z[p] - logits[p, t] + 0.3 * z[p] ** 2
    assert got[1] == 0
    torch.testing.assert_close(got[0], 2 * loss(0, 4))
    torch.testing.assert_close(got[2], 0.5 * loss(2, 0))
    assert torch.equal(torch.autograd.grad(got.sum(), h)[0][1], torch.zeros(4).double())


def peak(f: Callable[[], Any]) -> int:
    """Most bytes that the allocator held during ``f`` beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        f()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def test_memory_beyond_the_gradients_is_a_fraction_of_all_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    P, D, N = 256, 16, 16384
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * P * 512)
    assert cross_entropy.chunk_classes(P, N) == 512
    h, w = torch.randn(P, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    target = torch.randint(N, (P,))
    used = {}
    for name in ("reference", "chunked"):

        def step(name: str = name) -> None:
            with linear_cross_entropy.using(name):
                loss = linear_cross_entropy(h, w, target, z_loss=1e-4).sum()
            torch.autograd.grad(loss, (h, w))

        step()
        used[name] = peak(step) - 4 * (P * D + N * D)
    assert used["reference"] >= 4 * P * N
    assert used["chunked"] <= 0.15 * used["reference"], used


def test_chunks_of_a_gpu_are_few_and_bounded() -> None:
    of = cross_entropy.chunk_classes
    for tokens in (1, 1000, 8192, 16384, 1 << 17):
        for classes in (2, 50257, 128256, 256000):
            step = of(tokens, classes, "cuda")
            assert step == classes or (step >= 8192 * 3 // 4 and step % 128 == 0)
            assert 4 * tokens * step <= max(512 << 20, 4 * tokens * 8192)
            chunks = -(-classes // step)
            assert chunks == 1 or chunks * step - classes < 128 * chunks  # of one size, nearly
    assert [-(-128256 // of(8192, 128256, d)) for d in ("cpu", "cuda")] == [251, 8]
    # the same as ever on the CPU, whose caches are smaller
    assert [of(P, 49408) for P in (256, 340, 1024, 8192)] == [49408, 12336, 4096, 512]


@pytest.mark.parametrize("kind, kept", [("cpu", 0), ("cuda", 8192 * 8192)])
def test_the_device_decides_what_is_kept(kind: str, kept: int) -> None:
    with FakeTensorMode():
        h, w = (torch.empty(8192, 64, device=kind, dtype=torch.bfloat16) for _ in range(2))
        target = torch.empty(8192, device=kind, dtype=torch.int64)
        op = torch.ops.mm.linear_cross_entropy_triton
        *_, logits = op(h, w, target, None, torch.bfloat16, 0.0, True)
    assert logits.numel() == kept
    assert logits.dtype == torch.bfloat16


def test_the_head_pays_z_loss_in_training_only_and_caps_what_it_says() -> None:
    torch.manual_seed(0)
    plain = HEADS.get("softmax")().build(4, 7).double()
    head = HEADS.get("softmax")(z_loss=0.5, softcap=1.0).build(4, 7).double()
    with torch.no_grad():
        plain.weight.normal_()
        head.weight.copy_(plain.weight)
    h, places, target = randn(1, 3, 4), torch.arange(3), torch.tensor([1, 0, 6])
    ctx = Ctx(Layout.plain(1, 3), Causal())
    logits = (h[0] @ plain.weight.T).tanh()
    head.eval()
    nll = -logits.log_softmax(-1)[places, target]
    torch.testing.assert_close(head(h, ctx, places, target).nll, nll)
    torch.testing.assert_close(head(h, ctx, places).dist.log_prob(target), -nll)
    head.train()
    expected = nll + 0.5 * logits.logsumexp(-1) ** 2
    torch.testing.assert_close(head(h, ctx, places, target).nll, expected)
    plain.train()
    z0 = plain(h, ctx, places, target).nll
    torch.testing.assert_close(z0, -(h[0] @ plain.weight.T).log_softmax(-1)[places, target])


# ---- Triton ----


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_triton(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton_oracle import interpreted

    from mm.kernels.cross_entropy import rows_triton

    monkeypatch.setattr(rows_triton, "BLOCK", 16)
    monkeypatch.setattr(cross_entropy, "chunk_classes", lambda places, n, _: 32)
    sizes = (6, 5, 77)
    with interpreted():
        expected = results("reference", sizes, torch.float64, True, **settings)
        got = results("triton", sizes, torch.float32, True, **settings)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=3e-5)
        narrow = results("triton", sizes, torch.bfloat16, True, **settings)
    for a, b in zip(narrow, expected, strict=True):
        error = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < 3e-2


@pytest.mark.slow
def test_triton_is_built_for_hopper() -> None:
    pytest.importorskip("triton")
    from triton_oracle import built, recorded

    with recorded() as launches, contextlib.ExitStack() as stack:
        stack.enter_context(linear_cross_entropy.using("triton"))
        h = torch.empty(16, 64, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(4096, 64, dtype=torch.bfloat16, requires_grad=True)
        loss = linear_cross_entropy(h, w, torch.zeros(16).long(), softcap=30.0, z_loss=1e-4)
        loss.sum().backward()
    assert [built(one).check().name for one in launches] == ["_absorb_kernel", "_gradient_kernel"]


def test_a_frozen_head_takes_no_gradient_and_no_memory_for_one() -> None:
    """The gradient of what it reads is that beside a head that trains, bit by bit."""
    g = torch.Generator().manual_seed(2)
    h, target = torch.randn(64, 16, generator=g), torch.randint(4096, (64,), generator=g)
    weight, found, peaks = torch.randn(4096, 16, generator=g), [], []
    for frozen in (True, False):
        x, w = h.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = linear_cross_entropy(x, w, target).sum()
        loss.backward()  # compared with the reference, where it first meets such a call
        x.grad = w.grad = None
        loss = linear_cross_entropy(x, w, target).sum()
        with Measure() as measure:
            before = measure.live.now
            loss.backward()
        peaks.append(measure.live.peak - before)
        assert (w.grad is None) == frozen
        found.append(x.grad)
    assert torch.equal(*found)
    assert peaks[1] - peaks[0] >= weight.numel() * 4 * 0.9, peaks
