"""Sparse, structured and top-k attention against dense matrices written out from the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import TOL, D, alone, documents
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.attention.combiner import Combiner
from mm.model.mixers.attention.indexed import IndexedAttention
from mm.model.mixers.attention.sparse_attention import SparseAttention
from mm.model.mixers.attention.topk_attention import to_nearest_neighbours
from mm.registry import MIXERS

LENGTHS = (1, 3, 63, 64, 65, 130)


def build(kind: str, **settings: Any) -> IndexedAttention:
    torch.manual_seed(4)
    layer = MIXERS.get(kind)(
        **{"heads": 2, "position": "none", "qk_norm": False, **settings}
    ).build(D)
    init_weights(layer)
    return layer.double()


def projected(layer: IndexedAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values `(H, T, K)` of one document."""
    H, G, K = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v = (x @ layer.qkv.weight.T).view(-1, H + 2 * G, K).transpose(0, 1).split((H, G, G))
    return q * K**-0.5, k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)


def finished(layer: IndexedAttention, y_HTK: Tensor) -> Tensor:
    return y_HTK.transpose(0, 1).flatten(1) @ layer.out.weight.T


def same(layer: IndexedAttention, written_out: Any, T: int) -> None:
    """Outputs and the gradients of input and parameters."""
    (x,) = documents(T)
    weight = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_(), *layer.parameters()]
    outs = alone(layer, x), written_out(x)
    torch.testing.assert_close(*outs, **TOL)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def masked(seen_HTT: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT).masked_fill(~seen_HTT, -math.inf).softmax(-1)
    return p.masked_fill(~seen_HTT, 0) @ v


def patterns(pattern: str, T: int, b: int, c: int) -> tuple[Tensor, Tensor]:
    """Both index sets of section 4.2 and 4.3, element by element."""
    first, second = (torch.zeros(T, T, dtype=torch.bool) for _ in range(2))
    for i in range(T):
        for j in range(i + 1):
            if pattern == "strided":
                first[i, j], second[i, j] = j >= i - b, (i - j) % b == 0
            else:
                first[i, j], second[i, j] = j // b == i // b, j % b in range(b - c, b)
    return first, second


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("use", ["heads", "merged", "first", "second"])
def test_sparse_blocks_are_the_dense_matrix_with_the_papers_mask(pattern: str, use: str) -> None:
    layer = build("sparse_attention", pattern=pattern, use=use, stride=8, columns=3)
    for T in LENGTHS:
        first, second = patterns(pattern, T, 8, 3)
        seen = {
            "heads": torch.stack((first, second)),
            "merged": first | second,
            "first": first,
            "second": second,
        }[use]
        same(layer, lambda x, seen=seen: finished(layer, masked(seen, *projected(layer, x))), T)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_two_sparse_steps_reach_every_place_before(pattern: str) -> None:
    layer = build("sparse_attention", pattern=pattern, stride=6, columns=1)
    assert isinstance(layer, SparseAttention)
    at = torch.arange(40)[None]
    hops = [layer.sees(at, at, use)[0].double() for use in ("first", "second")]
    # Fixed: a place is first carried to its block's last column, then read from there.
    reach = (hops[0] @ hops[1] + hops[1] @ hops[0] + hops[0]) > 0
    assert torch.equal(reach, torch.ones(40, 40, dtype=torch.bool).tril())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_sparse_scores_grow_with_the_root() -> None:
    """With the stride at the root of the length, the largest tensor grows with exponent 1.5."""
    held = []
    for T in (256, 4096):
        layer = build("sparse_attention", stride=math.isqrt(T), use="merged")
        q = torch.zeros(1, T, 2, 8)
        with Largest() as largest, torch.no_grad():
            layer.rows(q, q, q)
        held.append(largest.elements)
    assert held[1] < 4096**2 / 10
    assert math.log(held[1] / held[0], 16) == pytest.approx(1.5, abs=0.02)


# ---- Combiner ----


def combined(layer: Combiner, x: Tensor) -> Tensor:
    """`(H, T, T)` probabilities from the paper's conditional expectation, place by place."""
    q, k, _ = projected(layer, x)
    H, T, c = q.shape[0], q.shape[1], layer.region
    pool = (lambda t: t.amax(1)) if layer.pool == "max" else (lambda t: t.mean(1))
    p = x.new_zeros(H, T, T)
    for i in range(T):
        r = i // c
        direct = torch.einsum("hk,hjk->hj", q[:, i], k[:, r * c : i + 1]).exp()
        regions = [slice(m * c, (m + 1) * c) for m in range(r)]
        mass = [torch.einsum("hk,hk->h", q[:, i], pool(k[:, s])).exp() for s in regions]
        Z = direct.sum(1) + sum(mass)
        p[:, i, r * c : i + 1] = direct / Z[:, None]
        for s, m in zip(regions, mass, strict=True):
            local = torch.einsum("hk,hjk->hj", pool(q[:, s]), k[:, s]).softmax(-1)
            p[:, i, s] = (m / Z)[:, None] * local
    return p


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_combiner_is_the_papers_expectation(pool: str) -> None:
    layer = build("combiner", region=4, pool=pool)
    assert isinstance(layer, Combiner)
    for T in (1, 3, 4, 5, 22):
        same(layer, lambda x: finished(layer, combined(layer, x) @ projected(layer, x)[2]), T)
    p = combined(layer, documents(22)[0])
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 22).double())  # row-stochastic
    assert torch.equal(p > 0, torch.ones(22, 22, dtype=torch.bool).tril().expand(2, -1, -1))


@pytest.mark.parametrize("region", [1, 64])
def test_combiner_of_single_places_or_of_one_region_is_attention(region: int) -> None:
    layer, (x,) = build("combiner", region=region), documents(30)
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    expected = finished(layer, masked(seen, *projected(layer, x)))
    torch.testing.assert_close(alone(layer, x), expected, **TOL)


# ---- top-k ----


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_topk_keeps_the_best_keys_and_all_of_them_are_attention(kv_heads: int) -> None:
    for topk, T in ((3, 17), (64, 40)):
        layer = build("topk_attention", topk=topk, kv_heads=kv_heads)

        def written_out(x: Tensor, layer: Any = layer, topk: int = topk, T: int = T) -> Tensor:
            q, k, v = projected(layer, x)
            logits = (q @ k.mT).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            least = logits.detach().sort(-1, descending=True).values[..., min(topk, T) - 1, None]
            return finished(layer, logits.masked_fill(logits < least, -math.inf).softmax(-1) @ v)

        same(layer, written_out, T)


def test_topk_takes_the_weights_of_attention() -> None:
    layer, (x,) = build("topk_attention", topk=99, position="rope"), documents(20)
    plain = MIXERS.get("attention")(heads=2, position="rope", qk_norm=False).build(D).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)


def test_nearest_neighbours_are_the_largest_inner_products() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(7, 5, dtype=torch.float64, generator=g)
    k = torch.randn(50, 5, dtype=torch.float64, generator=g) * torch.arange(1, 51)[:, None]
    up, down = to_nearest_neighbours(q, k)
    torch.testing.assert_close(down.norm(dim=-1), torch.ones(50).double())
    near, best = torch.cdist(up, down).argsort(-1), (q @ k.T).argsort(-1, descending=True)
    assert torch.equal(near, best)


# ---- what they refuse ----


@pytest.mark.parametrize("kind", ["sparse_attention", "combiner", "topk_attention"])
def test_they_refuse_what_they_are_not_made_for_by_name(kind: str) -> None:
    layer = build(kind)
    with pytest.raises(
        UserError, match=f"{kind} cannot run under a full mask: it needs mask: causal"
    ):
        layer(torch.zeros(1, 3, D).double(), Ctx(Layout.plain(1, 3), Full()))
    with pytest.raises(ValueError, match=f"{kind}: position 'alibi' changes scores"):
        build(kind, position="alibi")
