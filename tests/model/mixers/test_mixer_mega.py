"""Mega equals its equations. T tokens, D model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import D, alone, apply, documents, packed, serve, unpacked
from torch import Tensor

from mm.layout import Layout
from mm.model.backbones.stack import StackConfig
from mm.model.layer import init_weights
from mm.model.mixers.attention.mega import Mega, MegaConfig

TOL = {"rtol": 1e-9, "atol": 1e-10}


def made(**settings: object) -> Mega:
    torch.manual_seed(3)
    layer = MegaConfig(averages=3, key_dim=4, expand_value=0.5, **settings).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def steps(layer: Mega, x: Tensor) -> Tensor:
    """Section 3 of the paper: the average a token at a time, then dense attention."""
    a = layer.average
    alpha, delta = a.alpha.sigmoid(), a.delta.sigmoid()
    h, seen = torch.zeros_like(alpha), []
    for token in x:
        h = alpha * a.beta * token[:, None] + (1 - alpha * delta) * h
        seen.append((a.eta * h).sum(1) / 3**0.5)
    z, gamma, phi, moved = (layer.inner(torch.stack(seen)) + layer.bias).split(layer.sizes, -1)
    z, v = F.silu(z), F.silu(layer.value(x) + layer.value_bias)
    q, k = (layer.scales[i] * z + layer.shifts[i] for i in range(2))
    t = torch.arange(len(x))
    hidden = t[:, None] < t
    if layer.chunk is not None:
        hidden = hidden | (t[:, None] // layer.chunk != t // layer.chunk)
    o = (q @ k.T / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    moved = F.silu(moved + layer.mix(F.silu(gamma) * o))
    return phi.sigmoid() * moved + (1 - phi.sigmoid()) * x


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("T", (1, 3, 63, 65))
def test_mega_equals_its_equations_with_all_gradients(T: int, chunk: int | None) -> None:
    layer = made(chunk=chunk, position="none")
    (x,) = documents(T)
    x.requires_grad_()
    leaves, weight = [x, *layer.parameters()], torch.randn(T, D, dtype=torch.float64)
    got, expected = alone(layer, x), steps(layer, x)
    torch.testing.assert_close(got, expected, **TOL)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, **TOL)


def test_one_chunk_is_mega_and_chunks_count_from_the_document() -> None:
    full, one, four = made(), made(chunk=64), made(chunk=4)
    docs = documents(9, 1, 6)
    torch.testing.assert_close(alone(one, docs[0]), alone(full, docs[0]), **TOL)
    rows = [[(-1, docs[0], 0)], [(-1, docs[1], 0), (-1, docs[2], 0)]]
    x, layout = packed(rows, pad=1)  # type: ignore[arg-type]
    got = [y for _, y in unpacked(apply(four, x, layout).y, rows)]  # type: ignore[arg-type]
    for y, doc in zip(got, docs, strict=True):
        torch.testing.assert_close(y, alone(four, doc), **TOL)


def test_a_chunk_bounds_the_cache_and_the_average_still_crosses_it() -> None:
    layer = made(chunk=4)
    assert layer.state_bytes(1, 10_000) == layer.state_bytes(1, 4)
    docs = documents(11)
    with torch.no_grad():
        plan = [[[(0, 3)]], [[(0, 6)]], [[(0, 1)]], [[(0, 1)]]]
        (got,) = serve(layer, docs, plan, layer.initial_state(1, 64))
        torch.testing.assert_close(got, alone(layer, docs[0]), **TOL)
    x = docs[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(alone(layer, x)[8].sum(), x)
    assert grad[:8].abs().sum(1).gt(0).all(), "only the average can carry these"


def test_it_runs_in_mixed_precision() -> None:
    layer = made(chunk=4).float()
    x = documents(9)[0].float()[None].requires_grad_()
    expected = apply(layer, x, Layout.plain(1, 9)).y
    with torch.autocast("cpu", torch.bfloat16):
        got = apply(layer, x, Layout.plain(1, 9)).y
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert torch.autograd.grad(got.sum(), x)[0].isfinite().all()


def test_a_backbone_shares_what_its_layers_know_of_the_documents() -> None:
    """Groups of documents, chunks and rows made once a pass, for layers that split them unlike."""
    pattern = "mega_chunk mega hyena ttt atlas slstm trellis mlstm"
    mixers = {"mega_chunk": {"chunk": 4}, "mlstm": {"heads": 2}}
    layer = StackConfig(pattern=pattern, mixers=mixers, ffn=None).build(D)
    init_weights(layer)
    layer.double()
    docs = documents(9, 1, 6, 20)
    rows = [[(-1, docs[0], 0)], [(-1, docs[1], 0), (-1, docs[2], 0)], [(-1, docs[3], 0)]]
    x, layout = packed(rows, pad=1)  # type: ignore[arg-type]
    got = [y for _, y in unpacked(apply(layer, x, layout).y, rows)]  # type: ignore[arg-type]
    for y, doc in zip(got, docs, strict=True):
        torch.testing.assert_close(y, alone(layer, doc), rtol=1e-7, atol=1e-8)
