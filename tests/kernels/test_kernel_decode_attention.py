"""Split-K decoding: the work plan, merging, and equality with plain attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec
from mm.kernels.decode_attention import TILE, decode_attention, merge_pieces, plan

RAGGED = [1, 3, 63, 64, 65, 130, 0, 700, 1025]


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("tile", [1, 16, 256])
def test_the_plan_is_even_and_covers_every_place_once(workers: int, tile: int) -> None:
    work = plan(RAGGED, 2, tile, workers)
    tiles = [sum(-(-(p.stop - p.start) // tile) for p in share) for share in work]
    assert len(tiles) == workers and max(tiles) - min(tiles) <= 1
    assert all(p.start % tile == 0 for share in work for p in share)
    for row, head in itertools.product(range(len(RAGGED)), range(2)):
        mine = [p for share in work for p in share if (p.row, p.head) == (row, head)]
        places = [s for p in mine for s in range(p.start, p.stop)]
        assert places == list(range(RAGGED[row]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_equal_plain_attention(
    dtype: torch.dtype, G: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # shares of the plan
    g = torch.Generator().manual_seed(0)
    S, R = max(RAGGED), len(RAGGED)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    q, k, v, length = rand(R, 4, 6), rand(R, S, G, 6), rand(R, S, G, 5), torch.tensor(RAGGED)
    q[4] *= 40  # logits whose exponentials overflow
    with decode_attention.using("tiled"):
        got = decode_attention(q, k, v, length)
    with decode_attention.using("reference"):
        same = decode_attention(q, k, v, length)
    allowed = (torch.arange(S) < length[:, None])[:, None]
    with attention.using("reference"):
        plain = attention(q[:, None], k, v, MaskSpec(allowed))[:, 0]
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for expected in (same, plain):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert (got[6] == 0).all() and max(RAGGED) > TILE


def test_any_split_merges_to_the_whole_softmax() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(50, generator=g) * 30
    values = torch.randn(50, 3, generator=g)
    expected = logits.double().softmax(0) @ values.double()
    for borders in ([0, 50], [0, 1, 2, 50], [0, 17, 18, 49, 50]):
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for a, b in itertools.pairwise(borders):
            top = logits[a:b].max()
            p = (logits[a:b] - top).exp()
            parts.append((top, p.sum(), p @ values[a:b]))
        top, total, out = (torch.stack(t) for t in zip(*parts, strict=True))
        unit = torch.zeros(len(parts), dtype=torch.long)
        y = merge_pieces(top, total, out, unit, 2)
        torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=1e-6)
        assert (y[1] == 0).all() and math.isfinite(float(y.sum()))


def test_it_has_no_backward_and_says_so() -> None:
    q, k, v = (
        torch.randn(1, 2, 4, requires_grad=True),
        torch.randn(1, 3, 1, 4),
        torch.ones(1, 3, 1, 2),
    )
    assert decode_attention.pick(q, k, v, torch.tensor([3])) == "reference"
    with torch.no_grad():
        assert decode_attention.pick(q, k, v, torch.tensor([3])) == "tiled"
