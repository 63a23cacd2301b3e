"""Transformer-VQ against quadratic attention over the same quantised keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import TOL, D, alone, apply, documents, packed
from torch import Tensor

from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.attention.transformer_vq import TransformerVQ
from mm.registry import MIXERS


def build(**settings: Any) -> TransformerVQ:
    torch.manual_seed(4)
    layer = MIXERS.get("transformer_vq")(**{"heads": 2, "codes": 6, "block": 8, **settings}).build(
        D
    )
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def quadratic(layer: TransformerVQ, x: Tensor) -> Tensor:
    """Attention over all places before, `(T, T)`; keys behind the block before are constants."""
    H, G, K, b = layer.heads, layer.kv_heads, layer.head_dim, layer.block
    T = len(x)
    q, k, v = (x @ layer.qkv.weight.T).view(T, H + 2 * G, K).split((H, G, G), 1)
    q, k = layer.q_norm(q), layer.k_norm(k)
    far = (k[:, :, None] - layer.codes).norm(dim=-1)  # (T, G, S)
    quantised = torch.stack([layer.codes[g][far[:, g].argmin(-1)] for g in range(G)], 1)
    near = k + (quantised - k).detach()
    spread = lambda t: t.repeat_interleave(H // G, 1)
    at = torch.arange(T)
    distance = at[:, None] - at
    direct = at[:, None] // b - at // b <= 1
    one = torch.einsum("thk,shk->hts", q, spread(near))
    two = torch.einsum("thk,shk->hts", q, spread(quantised))
    logits = torch.where(direct, one, two) * K**-0.5
    bias = layer.bias[:, distance.clamp(0, 2 * b - 1)]
    logits = logits + torch.where(direct, bias, 0)
    p = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    y = torch.einsum("hts,shk->thk", p, spread(v)).flatten(1)
    return (y * F.silu(x @ layer.gate.weight.T)) @ layer.out.weight.T


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_linear_form_is_quadratic_attention(kv_heads: int) -> None:
    layer = build(kv_heads=kv_heads)
    for T in (1, 3, 63, 64, 65, 130):
        (x,) = documents(T)
        weight = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        leaves = [x.requires_grad_(), *layer.parameters()]
        outs = alone(layer, x), quadratic(layer, x)
        torch.testing.assert_close(*outs, **TOL)
        grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in outs]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_its_state_does_not_grow_and_segments_are_one_pass() -> None:
    layer, (doc,) = build(), documents(70)
    assert layer.state_bytes(1, 10) == layer.state_bytes(1, 10**6)
    for sizes in ((1,) * 70, (7,) * 10, (8, 1, 40, 21)):
        with torch.no_grad():
            state, outs, at = layer.initial_state(1, 70), [], 0
            for n in sizes:
                x, layout = packed([[(0, doc[at : at + n], at)]])
                out = apply(layer, x, layout, state)
                state, at = out.state, at + n
                assert state.n_bytes() == layer.state_bytes(1, 70)
                outs.append(out.y[0])
        torch.testing.assert_close(torch.cat(outs), quadratic(layer, doc), **TOL)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_refused_guess_leaves_no_trace_whatever_it_held(value: float) -> None:
    layer, (doc,) = build(block=4), documents(9)
    with torch.no_grad():
        guess = doc[:6].clone()
        guess[2:] = value
        x, layout = packed([[(0, guess, 0)]])
        state = apply(layer, x, layout, layer.initial_state(1, 9), draft=True).state
        x, layout = packed([[(0, doc[2:], 2)]])
        y = apply(layer, x, layout, state.accept(torch.tensor([2]))).y[0]
    torch.testing.assert_close(y, alone(layer, doc)[2:], **TOL)


def test_codes_follow_their_keys_as_statistics_say() -> None:
    layer = build(decay=0.5).float().train()
    x = torch.randn(2, 64, D, generator=torch.Generator().manual_seed(0))
    ctx, far = Ctx(Layout.plain(2, 64), Causal()), []
    before = layer.codes.clone()
    for _ in range(12):
        out = layer(x, ctx)
        assert torch.equal(layer.codes, before)  # a forward changes no buffer
        far.append(out.aux["commitment"].mean().item())
        layer.after_step({k: s.detach() for k, s in out.aux.items()})
        assert not torch.equal(layer.codes, before)
        before = layer.codes.clone()
    assert far[-1] < 0.6 * far[0], far
    (grad,) = torch.autograd.grad(layer(x, ctx).aux["commitment"].total, layer.qkv.weight)
    K, H = layer.head_dim, layer.heads
    assert grad[H * K : (H + 1) * K].abs().max() > 0 and grad[: H * K].abs().max() == 0
    assert not layer.eval()(x, ctx).aux
