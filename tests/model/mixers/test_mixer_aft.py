"""AFT and memory-compressed attention against their papers' sums, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import TOL, D, alone, apply, documents, packed
from torch import Tensor

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Layer, init_weights
from mm.model.mixers.attention.memory_compressed import MemoryCompressedAttention
from mm.model.mixers.linear_attention.aft import AFT
from mm.registry import MIXERS


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(4)
    layer = MIXERS.get(kind)(**settings).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def same(layer: Layer, written_out: Any, T: int) -> None:
    (x,) = documents(T)
    weight = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_(), *layer.parameters()]
    outs = alone(layer, x), written_out(x)
    torch.testing.assert_close(*outs, **TOL)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def averaged(layer: AFT, x: Tensor) -> Tensor:
    """Equation 2 under a causal mask: a softmax over places for every channel, `(T, T, D)`."""
    T, D, H = len(x), layer.width, layer.heads
    q, v, k = (x @ layer.qkv.weight.T).split((D, D, H), -1)
    at = torch.arange(T)
    distance = at[:, None] - at
    near = (distance >= 0) & (distance < layer.window)
    w = x.new_zeros(T, T, H)
    if layer.form == "conv":
        w = layer.bias[distance.clamp(0, layer.window - 1)]
    elif layer.form != "simple":
        w = (layer.reader[:T] @ layer.read[:T].T)[..., None].expand(-1, -1, H)
    w = torch.where(near[..., None], w, 0)
    logits = (k + w).masked_fill((distance < 0)[..., None], -math.inf)
    p = logits.softmax(1).repeat_interleave(D // H, -1)
    return (q.sigmoid() * (p * v).sum(1)) @ layer.out.weight.T


FORMS = {
    "simple": {},
    "conv": {"window": 5},
    "local": {"window": 5, "max_len": 130, "rank": 3},
    "full": {"max_len": 70, "rank": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_aft_is_the_papers_average(form: str) -> None:
    layer = build("aft", form=form, **FORMS[form])
    for T in (1, 3, 65) if form == "full" else (1, 3, 63, 64, 65, 130):
        same(layer, lambda x: averaged(layer, x), T)


def test_aft_local_with_the_longest_window_is_aft_full() -> None:
    full = build("aft", form="full", max_len=20, rank=3)
    local = build("aft", form="local", window=20, max_len=20, rank=3)
    local.load_state_dict(full.state_dict())
    (x,) = documents(20)
    torch.testing.assert_close(alone(local, x), alone(full, x), **TOL)
    for layer in (local, full):
        with pytest.raises(UserError, match="knows positions up to 20: a document has 21"):
            alone(layer, documents(21)[0])
        with pytest.raises(UserError, match="raise max_len"):
            layer.initial_state(1, 21)
        assert not layer.caps.length_general


@pytest.mark.parametrize("form", ["simple", "conv"])
def test_aft_neither_overflows_nor_forgets_in_float32(form: str) -> None:
    """Keys far apart: exp of them overflows, and each new largest key dwarfs all before."""
    layer = build("aft", form=form, **FORMS[form]).float()
    x = torch.cat([documents(40)[0] * s for s in (1.0, 300.0, 1.0)]).float().requires_grad_()
    y = layer(x[None], Ctx(Layout.plain(1, 120), Causal())).y[0]
    expected = averaged(layer.double(), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_aft_simple_decodes_from_two_sums_a_channel() -> None:
    layer = build("aft")
    assert layer.state_bytes(1, 10**6) == 3 * D * 8 + 8
    (doc,) = documents(30)
    with torch.no_grad():
        state, outs = layer.initial_state(1, 4), []
        for t in range(30):
            x, layout = packed([[(0, doc[t : t + 1], t)]])
            out = apply(layer, x, layout, state)
            state = out.state
            outs.append(out.y[0])
    torch.testing.assert_close(torch.cat(outs), averaged(layer, doc), **TOL)


# ---- memory-compressed attention ----


def compressed(layer: MemoryCompressedAttention, x: Tensor) -> Tensor:
    """A strided convolution by torch's own, for every query anew on the places up to it."""
    H, K, s = layer.heads, layer.head_dim, layer.stride
    q, k, v = (x @ layer.qkv.weight.T).chunk(3, -1)
    rows = []
    for t in range(len(x)):
        short = []
        for u, w in ((k, layer.conv_weight[0]), (v, layer.conv_weight[1])):
            u = u[: t + 1]
            u = torch.cat((u, u.new_zeros(-len(u) % s, D)))
            short.append(torch.conv1d(u.T[None], w.permute(2, 1, 0), stride=s)[0].T)
        assert len(short[0]) == -(-(t + 1) // s)
        kh, vh = (u.view(-1, H, K).transpose(0, 1) for u in short)
        p = torch.einsum("hk,hsk->hs", q[t].view(H, K), kh) * K**-0.5
        rows.append(torch.einsum("hs,hsk->hk", p.softmax(-1), vh).flatten())
    return torch.stack(rows) @ layer.out.weight.T


@pytest.mark.parametrize("stride", [2, 3])
def test_compressed_memory_is_a_strided_convolution(stride: int) -> None:
    layer = build("memory_compressed", heads=2, stride=stride)
    for T in (1, 2, 3, 4, 7, 30):
        same(layer, lambda x: compressed(layer, x), T)


def test_compressed_memory_keeps_one_key_a_group() -> None:
    layer, plain = build("memory_compressed"), MIXERS.get("attention")().build(D).double()
    assert layer.state_bytes(1, 3000) < plain.state_bytes(1, 3000) / 2.9
    state = layer.initial_state(1, 30)
    assert state.kv.k.shape[2] == 10
