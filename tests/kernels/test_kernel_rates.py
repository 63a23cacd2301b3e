"""Which attention a GPU takes: the fastest of a table among those that take the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _get_sdp_priority_order  # pyright: ignore[reportAttributeAccessIssue]

from mm.kernels import device
from mm.kernels.attention import attention, cudnn, rates
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.plan.fake_card import fake_card
from mm.plan.fake_cuda import CUDA, backward, fake_cuda
from mm.plan.launches import Launches

T = 1024
H, G = 16, 8


def specs() -> dict[str, tuple[MaskSpec, ScoreSpec]]:
    ids = lambda: torch.ones(1, T, dtype=torch.int32, device=CUDA)
    causal, plain = MaskSpec(causal=True), ScoreSpec()
    borders = torch.zeros(3, dtype=torch.int32, device=CUDA)
    documents = causal._replace(document_RT=ids(), document_RS=ids(), starts_M=borders)
    return {
        "causal": (causal, plain),
        "full": (MaskSpec(), plain),
        "window": (causal._replace(window=64), plain),
        "documents": (documents, plain),
        "documents and window": (documents._replace(window=64), plain),
        "documents without borders": (documents._replace(starts_M=None), plain),
        "prefix": (documents._replace(prefix_RT=ids(), prefix_RS=ids()), plain),
        "allowed": (MaskSpec(torch.ones(1, T, T, dtype=torch.bool, device=CUDA)), plain),
        "soft-cap": (causal, ScoreSpec(softcap=30.0)),
        "sink": (causal, ScoreSpec(sink_H=torch.zeros(H, device=CUDA))),
        "bias": (causal, ScoreSpec(bias_RHTS=torch.zeros(1, H, T, T, device=CUDA))),
    }


def qkv(width: int, dtype: torch.dtype, heads: int = G, n: int = T) -> list[Tensor]:
    make = lambda h: torch.empty(1, n, h, width, dtype=dtype, device=CUDA, requires_grad=True)
    return [make(h) for h in (H, heads, heads)]


@pytest.mark.parametrize("card", device.CARDS)
def test_the_fastest_that_takes_a_call_runs(card: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation that takes it has a rate, or is among the slowest, which are last."""
    monkeypatch.setattr(device, "CARD", card)
    with fake_cuda(), fake_card():
        for width in (64, 128, 256, 320):
            for dtype in (torch.bfloat16, torch.float32):
                for name, (mask, score) in specs().items():
                    q, k, v = qkv(width, dtype)
                    given = (q, k, v, mask, score)
                    able = {
                        way
                        for way, (_, why_not) in attention.implementations.items()
                        if why_not(*given) is None
                    }
                    known = {
                        way: found.tflops
                        for way in able
                        if (found := rates.rate(way, q, v, mask, score))
                    }
                    at = (card, width, dtype, name, able)
                    assert able == known.keys() | (able & set(rates.SLOWEST)), at
                    assert all(known.values()) or width > 256 or dtype == torch.float32, at
                    last = next(way for way in rates.SLOWEST if way in able)
                    best = max(known, key=lambda way: known[way], default=last)
                    assert attention.pick(*given) == best, at


def picked(*given: Any) -> str:
    with fake_cuda(), fake_card():
        return attention.pick(*given)


@pytest.mark.parametrize(
    ("card", "chosen"), [(80, "sdpa"), (86, "cudnn"), (90, "cudnn"), (100, "cudnn")]
)
def test_a_plain_row_takes_cudnn_where_it_is_faster(
    card: int, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "CARD", card)
    causal = MaskSpec(causal=True)
    with fake_cuda() as reads, fake_card(), caplog.at_level("INFO", "mm.kernels"):
        monkeypatch.setattr(attention, "_logged", set())
        given = qkv(128, torch.bfloat16)
        backward(attention(*given, causal).float().sum())
        assert [x.grad is not None for x in given] == [True] * 3
        named = "cudnn" if chosen == "cudnn" else "flash"
        assert reads.kernels[f"aten::_scaled_dot_product_{named}_attention"] == 1
        assert _get_sdp_priority_order() == before
    found = rates.rate(chosen, given[0], given[2], causal, ScoreSpec())
    assert found is not None
    said = f"attention: using {chosen}, {found.tflops:g} TFLOP/s, {found.source.partition(':')[0]}"
    assert caplog.records[0].getMessage().startswith(said)


before = _get_sdp_priority_order()


def test_cudnn_is_asked_for_what_it_does_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a mask, not for tiles that are not full, not for few heads on a B200."""
    causal = MaskSpec(causal=True)
    monkeypatch.setattr(device, "CARD", 90)
    with fake_cuda(), fake_card():
        why_not = lambda *given: str(attention.implementations["cudnn"][1](*given))
        half = torch.bfloat16
        assert why_not(*qkv(128, half), causal) == "None"
        assert why_not(*qkv(256, half), causal) == "None"
        assert why_not(*qkv(128, half, heads=4), causal) == "None"
        for n in (256, 960, 1000):
            assert "a multiple of 128" in why_not(*qkv(128, half, n=n), causal)
        q, k, v = qkv(128, half)
        assert "a multiple of 128" in why_not(q[:, :512], k, v, causal)
        masked = [name for name in specs() if name not in ("causal", "full")]
        assert all("one document" in why_not(q, k, v, *specs()[name]) for name in masked)
        assert "bfloat16" in why_not(*qkv(128, torch.float32), causal)
        with torch.no_grad():
            assert "for training alone" in why_not(q, k, v, causal)
        monkeypatch.setattr(device, "CARD", 100)
        assert "wrong on this card" in why_not(*qkv(128, half, heads=4), causal)
        assert "up to 128" in why_not(*qkv(256, half), causal)
        assert attention.pick(*qkv(128, half, heads=4), causal) == "sdpa"


@pytest.mark.parametrize("mask", [MaskSpec(causal=True), MaskSpec()], ids=["causal", "full"])
def test_cudnn_counts_the_operations_that_sdpa_does(mask: MaskSpec) -> None:
    counted: dict[str, float] = {}
    for way in ("cudnn", "sdpa"):
        with fake_cuda(), fake_card(), Launches() as launches:
            with attention.using(way):
                y = attention(*qkv(128, torch.bfloat16), mask)
            backward(y, torch.empty_like(y))
        counted[way] = launches.flops
    pairs = T * (T + 1) / 2 if mask.causal else T * T
    assert counted["cudnn"] == counted["sdpa"] >= 3.5 * 4 * H * 128 * pairs * 0.99


def test_sdpa_never_takes_cudnn_by_itself() -> None:
    """With a mask it would be the default of PyTorch on Hopper, with NaN in the backward."""
    seen: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention
    cudnn_on = lambda: torch.backends.cuda.cudnn_sdp_enabled()
    with fake_cuda(), fake_card(), pytest.MonkeyPatch.context() as patch:
        inner = torch.nn.functional.scaled_dot_product_attention
        assert inner is not real
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *a, **kw: (seen.append(cudnn_on()), inner(*a, **kw))[1],
        )
        few = qkv(64, torch.bfloat16, n=192)
        ids = torch.ones(1, 192, dtype=torch.int32, device=CUDA)
        mask = MaskSpec(causal=True, document_RT=ids, document_RS=ids)
        assert attention.pick(*few, mask) == "sdpa"
        attention(*few, mask)
        with attention.using("sdpa"):
            attention(*qkv(64, torch.bfloat16), MaskSpec(causal=True))
        assert seen == [False, False] and cudnn_on()


def test_cudnn_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives to SDPA, which here has no cuDNN and takes the next."""
    monkeypatch.setattr(device, "KIND", "cpu")
    monkeypatch.setattr(cudnn, "LEAST", 128)
    torch.manual_seed(0)
    make = lambda h: torch.randn(2, 128, h, 16, dtype=torch.bfloat16, requires_grad=True)
    for mask in (MaskSpec(causal=True), MaskSpec()):
        given = [make(h) for h in (4, 2, 2)]
        found = []
        for way in ("cudnn", "reference"):
            with attention.using(way):
                y = attention(*given, mask, ScoreSpec(scale=0.3))
            found.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_cudnn_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of PyTorch's kernels is a constant of a compiled layer."""
    monkeypatch.setattr(device, "KIND", "cpu")
    monkeypatch.setattr(cudnn, "LEAST", 128)
    given = [torch.randn(1, 128, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    way = attention.implementations["cudnn"][0]
    compiled = torch.compile(way, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), way(*given))
