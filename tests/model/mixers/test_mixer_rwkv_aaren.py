"""RWKV-4, RWKV-6 and attention as a recurrence, against their papers step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import D, alone, build, documents
from torch import Tensor

from mm.model.mixers.linear_attention.aaren import Aaren
from mm.model.mixers.linear_attention.rwkv4 import RWKV4
from mm.model.mixers.linear_attention.rwkv6 import RWKV6


def rwkv4_by_sums(layer: RWKV4, x_TD: Tensor) -> Tensor:
    """Eq. 11 to 17 of the paper, with every token's average written out."""
    before = F.pad(x_TD, (0, 0, 1, 0))[:-1]
    r, k, v = (
        project(layer.mix[i] * x_TD + (1 - layer.mix[i]) * before)
        for i, project in enumerate(layer.projections)
    )
    w, out = layer.log_decay.exp(), []
    for t in range(len(x_TD)):
        ages = torch.arange(t - 1, -1, -1)[:, None]
        logits = torch.cat((k[:t] - ages * w, (layer.bonus + k[t])[None]))
        out.append((logits.softmax(0) * v[: t + 1]).sum(0))
    return layer.out(r.sigmoid() * torch.stack(out))


@pytest.mark.parametrize("strength", [1.0, 80.0])
@pytest.mark.parametrize("T", [1, 3, 65])
def test_rwkv4_equals_its_equations_in_all_gradients(T: int, strength: float) -> None:
    layer, (x,) = build("mixer:rwkv4"), documents(T)
    assert isinstance(layer, RWKV4)
    with torch.no_grad():
        layer.projections[1].weight.mul_(strength)
    x.requires_grad_()
    found = []
    for y in (alone(layer, x), rwkv4_by_sums(layer, x)):
        found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


def rwkv6_by_steps(layer: RWKV6, x_TD: Tensor) -> Tensor:
    """Eq. 14-19 of the paper, token by token, one head at a time."""
    H, K = layer.heads, D // layer.heads
    S = [torch.zeros(K, K, dtype=x_TD.dtype) for _ in range(H)]
    last, out = torch.zeros(D, dtype=x_TD.dtype), []
    names = ("receptance", "key", "value", "gate", "decay")
    for x in x_TD:
        near = x + (last - x) * layer.mix_base
        low = torch.tanh(layer.mix_in(near)).view(5, -1)
        mixed = {
            n: x + (last - x) * (layer.mix[i] + low[i] @ layer.mix_out[i])
            for i, n in enumerate(names)
        }
        r, k, v, gate = (p(mixed[n]) for p, n in zip(layer.projections, names, strict=False))
        d = layer.decay + torch.tanh(layer.decay_in(mixed["decay"])) @ layer.decay_out
        w = torch.exp(-torch.exp(d))
        heads = []
        for h in range(H):
            at = slice(h * K, (h + 1) * K)
            kv = torch.outer(k[at], v[at])
            heads.append(r[at] @ (S[h] + layer.bonus[at, None] * kv))
            S[h] = w[at, None] * S[h] + kv
        o = F.group_norm(torch.cat(heads)[None], H, layer.norm_weight, layer.norm_bias, 1e-5 * H)
        out.append(layer.out(F.silu(gate) * o[0]))
        last = x
    return torch.stack(out)


@pytest.mark.parametrize("T", [1, 3, 65])
def test_rwkv6_equals_its_equations_in_all_gradients(T: int) -> None:
    layer, (x,) = build("mixer:rwkv6"), documents(T)
    assert isinstance(layer, RWKV6)
    x.requires_grad_()
    weight, found = torch.randn(T, D, dtype=torch.float64), []
    for y in (alone(layer, x), rwkv6_by_steps(layer, x)):
        leaves = [x, *layer.parameters()]
        grads = torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)
        found.append((y, *grads))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("strength", [1.0, 80.0])
@pytest.mark.parametrize("T", [1, 3, 64, 65, 130])
def test_aaren_equals_softmax_attention_of_its_query_at_every_prefix(
    T: int, strength: float
) -> None:
    layer, (x,) = build("mixer:aaren"), documents(T)
    assert isinstance(layer, Aaren)
    with torch.no_grad():
        layer.query.mul_(strength)
    x.requires_grad_()
    k, v = (t.unflatten(-1, (2, -1)) for t in layer.kv(x).chunk(2, -1))
    logits = torch.einsum("thv,hv->ht", k, layer.query) * layer.width**-0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = logits[:, None].expand(-1, T, -1).masked_fill(future, -torch.inf).softmax(-1)
    expected = layer.out(torch.einsum("hts,shv->thv", weights, v).flatten(1))
    got = alone(layer, x)
    assert strength == 1.0 or T < 64 or logits.abs().max() > 50
    found = []
    for y in (got, expected):
        leaves = [x, *layer.parameters()]
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_merge_of_two_parts_of_a_text_is_associative() -> None:
    """(m, c, a) + (m', c', a'): any bracketing of parts gives the state that the scan gives."""
    layer = build("mixer:aaren")
    assert isinstance(layer, Aaren)
    torch.manual_seed(0)
    score, v = torch.randn(1, 9, 2).double() * 40, torch.randn(1, 9, D).double()
    none = layer.sums.initial_state(1, 9).h
    after = lambda a, b: layer._average(score[:, a:b], v[:, a:b], none)[1][:, -1]

    def merged(x: Tensor, y: Tensor) -> Tensor:
        m = torch.maximum(x[:, :2], y[:, :2])
        units = lambda s: (s[:, :2] - m).exp()
        spread = lambda s: torch.cat((units(s), units(s).repeat_interleave(D // 2, -1)), -1)
        return torch.cat((m, spread(x) * x[:, 2:] + spread(y) * y[:, 2:]), -1)

    one, two, three = after(0, 2), after(2, 7), after(7, 9)
    for state in (merged(merged(one, two), three), merged(one, merged(two, three))):
        torch.testing.assert_close(state, after(0, 9), rtol=1e-10, atol=1e-12)


def test_aarens_state_does_not_grow() -> None:
    layer = build("mixer:aaren")
    assert layer.state_bytes(1, 128) == layer.state_bytes(1, 8192) > 0
