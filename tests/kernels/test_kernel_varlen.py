"""Attention of varying lengths: what is asked of PyTorch's kernel is what documents alone give.

Its kernels need a GPU. Here a function of the same meaning stands in their place: what is held is
what they are given: borders, windows, heads, and what is done with padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import device
from mm.kernels.attention import attention, varlen
from mm.kernels.attention.spec import MaskSpec
from mm.layout import Doc, Layout
from mm.mask import Causal, Mask, Window
from mm.model.length_buckets import LengthBuckets
from mm.plan.fake_cuda import CUDA, fake_cuda

ROWS = [[Doc(3), Doc(1), Doc(5)], [], [Doc(6)]]  # padding behind, and a row without documents
H, G, K = 4, 2, 16


def sequences(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, longest: int,
    longest_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`varlen_attn` in the words of its documentation, sequence by sequence."""
    assert starts.dtype == torch.int32
    assert torch.equal(starts, starts_k)
    out = torch.full_like(q, torch.nan)  # what no sequence reaches is not written
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        n, (left, right) = b - a, window_size
        assert n <= min(longest, longest_k), "the kernel writes no further"
        far = torch.arange(n)[:, None] - torch.arange(n)
        seen = (far >= -right) & ((far <= left) if left >= 0 else True)
        parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        out[a:b] = y[0].transpose(0, 1)
    return out


def spec_of(layout: Layout, mask: Mask) -> MaskSpec:
    (group,) = LengthBuckets.of(layout, mask, flat=True).groups
    return group.mask


@pytest.mark.parametrize("mask", [Causal(), Window(2)], ids=["causal", "window"])
def test_documents_of_rows_are_its_sequences(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "KIND", "cpu")
    monkeypatch.setattr(varlen, "_function", lambda: sequences)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64,))
    layout = Layout.from_rows(ROWS, 10)
    spec = spec_of(layout, mask)
    torch.manual_seed(0)
    shapes: Sequence[tuple[int, ...]] = ((3, 10, H, K), (3, 10, G, K), (3, 10, G, K))
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    found = []
    for name in ("varlen", "reference"):
        with attention.using(name):
            y = attention(*given, spec)
        found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    assert torch.equal(found[0][0][layout.fields.document == 0], torch.zeros(15, H, K).double())
    torch.testing.assert_close(*found)


def test_a_packed_row_on_a_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.from_rows(ROWS, 512)
    with fake_cuda() as reads:
        spec = spec_of(layout.to(CUDA), Window(64))
        kind = {"dtype": torch.bfloat16, "device": CUDA}
        q, k, v = (torch.empty(3, 512, n, 64, **kind) for n in (H, G, G))
        assert attention.pick(q, k, v, spec) == "varlen"
        attention(q, k, v, spec)
        assert reads.kernels["torch_attn::_varlen_attn"] == 1
        assert reads.places == []
        wide = torch.empty(3, 512, H, 64, device=CUDA)
        assert attention.pick(wide, wide, wide, spec) == "triton"  # float32
        assert attention.pick(q, k, v, spec._replace(causal=False)) == "triton"
        broad = torch.empty(3, 512, H, 224, **kind)
        assert attention.pick(broad, broad, broad, spec) == "varlen"
        monkeypatch.setattr(device, "CARD", 86)  # FlashAttention has no backward of it there
        assert attention.pick(broad, broad, broad, spec) == "triton"
        with torch.no_grad():
            assert attention.pick(broad, broad, broad, spec) == "varlen"
