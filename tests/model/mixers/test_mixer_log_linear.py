"""Log-linear attention against its masked form, its Fenwick recurrence and the mixer it wraps."""

from __future__ import annotations

import math

import pytest
import torch
from laws import D, alone, documents
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm.config import Config
from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.linear_attention.delta_rule import DeltaRuleConfig
from mm.model.mixers.linear_attention.linear_attention import LinearAttentionConfig
from mm.model.mixers.linear_attention.log_linear import (
    LogLinear,
    LogLinearConfig,
    Steps,
    advance,
    level,
)

INNER: dict[str, Config] = {
    "linear": LinearAttentionConfig(heads=2, feature="silu", normalise=False, decay="scalar"),
    "gated delta": DeltaRuleConfig(
        heads=2, key_dim=4, value_dim=6, gate="scalar", output_gate=True, negative_eigenvalues=True
    ),
    "delta": DeltaRuleConfig(heads=2, conv_size=1),
}


def made(levels: int, inner: Config) -> LogLinear:
    torch.manual_seed(2)
    layer = LogLinearConfig(inner=inner, levels=levels).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def buckets(t: int) -> list[tuple[int, range]]:
    """The paper's greedy partition of places 0..t.

    T alone at level 0, then the largest power of two that fits, from the left.
    """
    found, at = [(0, range(t, t + 1))], 0
    while at < t:
        size = 1 << int(math.log2(t - at))
        found.append((int(math.log2(size)) + 1, range(at, at + size)))
        at += size
    return found


def test_levels_are_the_greedy_fenwick_partition() -> None:
    for t in range(70):
        parts = buckets(t)
        assert len(parts) <= math.log2(t + 1) + 2
        for e, places in parts:
            for s in places:
                assert level(torch.tensor(t), torch.tensor(s), 12) == e


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("levels", [3, 12])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_chunks_equal_the_masked_matrix_in_all_gradients(
    T: int, levels: int, inner: Config
) -> None:
    layer, (x,) = made(levels, inner), documents(T)
    x.requires_grad_()
    ctx = Ctx(Layout.plain(1, T), Causal())
    f, _ = layer.inner.features(x[None], ctx)
    base = layer.inner.attention_matrix(f, ctx)[0]  # (H, T, T)
    gain = torch.nn.functional.softplus(layer.gain(x) + layer.gain_bias).view(T, 2, levels)
    share = torch.zeros_like(base)
    for t in range(T):
        for e, places in buckets(t):
            share[:, t, places.start : places.stop] += gain[t, :, min(e, levels - 1), None]
    o = torch.einsum("hts,shv->thv", base * share, f["v"][0])
    expected = layer.inner.finish(o[None], x[None], f, ctx)[0]
    found = []
    for y in (alone(layer, x), expected):
        leaves = [x, *layer.parameters()]
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("word", ["log_linear_mamba2", "log_linear_gated_deltanet"])
def test_equal_weights_are_the_wrapped_mixer(word: str) -> None:
    layer = StackConfig(pattern=word).mixer(word).build(D).double()
    init_weights(layer)
    assert isinstance(layer, LogLinear)
    with torch.no_grad():
        layer.gain.weight.zero_()  # type: ignore[union-attr]
        layer.gain_bias.fill_(math.log(math.e - 1))
    (x,) = documents(100)
    torch.testing.assert_close(alone(layer, x), alone(layer.inner, x))


@pytest.mark.parametrize("delta", [False, True])
def test_a_token_by_token_fenwick_tree_has_the_same_buckets(delta: bool) -> None:
    """One matrix a bucket, merged as a binary counter carries.

    What a token erases, it erases from every bucket.
    """
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 41, 1, 3, dtype=torch.float64).unbind(0)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -torch.rand(1, 41, 1, dtype=torch.float64)
    beta = 2 * torch.rand(1, 41, 1, dtype=torch.float64)
    S = torch.zeros(1, 9, 1, 3, 3, dtype=torch.float64)
    tree: dict[int, Tensor] = {}
    for t in range(41):
        if t:  # the lowest zero bits of t were ones: those buckets and the last token merge
            low = (t & -t).bit_length()
            tree[low] = sum(tree.pop(e) for e in list(tree) if e < low)  # type: ignore[assignment]
        key, strength = k[0, t, 0], beta[0, t, 0] if delta else 1.0
        through = g[0, t].exp() * torch.eye(3, dtype=torch.float64)
        if delta:
            through = through @ (torch.eye(3) - strength * torch.outer(key, key))
        tree = {e: through @ m for e, m in tree.items()}
        tree[0] = strength * torch.outer(key, v[0, t, 0])
        one, at = torch.ones(1, dtype=torch.long), slice(t, t + 1)
        steps = Steps.of(k[:, at], k[:, at], g[:, at], beta[:, at] if delta else None)
        S = advance(S, one * t, steps, v[:, at], one)
        for e in range(9):
            torch.testing.assert_close(S[0, e, 0], tree.get(e, torch.zeros(3, 3).double()))


@pytest.mark.parametrize("inner", ["linear", "gated delta"])
def test_a_fresh_text_touches_as_many_levels_as_it_has_bits(inner: str) -> None:
    """Of 16 levels, a text of T tokens needs log2(T) + 1: the work of a token grows so, or less."""
    layer = made(16, INNER[inner])
    flops = []
    for T in (256, 2048):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            alone(layer, documents(T)[0])
        flops.append(counter.get_total_flops() / T)
    assert 1.0 < flops[1] / flops[0] < math.log2(4096) / math.log2(512)


def test_only_mixers_with_a_decay_by_head_are_wrapped() -> None:
    for word in ("gla", "linear_attention", "attention"):
        with pytest.raises(UserError, match="decays by head"):
            LogLinearConfig(inner=StackConfig(pattern=word).mixer(word)).build(D)
