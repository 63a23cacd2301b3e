"""Mixers that learn at test time equal their step forms, whose gradients autograd takes.

T tokens, D model, H heads, K head width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import D, alone, documents
from layer_toys import made
from torch import Tensor

from mm.kernels.delta_rule import delta_rule
from mm.kernels.linear_attention import linear_attention
from mm.model.layer import Layer
from mm.model.mixers.test_time.atlas import Atlas, AtlasConfig, newton_schulz
from mm.model.mixers.test_time.ttt import TTT, TTTConfig

TOL = {"rtol": 1e-8, "atol": 1e-9}


def same(layer: Layer, naive: Tensor, x: Tensor) -> None:
    """Outputs and the gradients of the input and of all parameters."""
    leaves, weight = [x, *layer.parameters()], torch.randn_like(x)
    got = alone(layer, x)
    torch.testing.assert_close(got, naive, **TOL)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (got, naive)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **TOL)


def primal(layer: TTT, x: Tensor) -> Tensor:
    """The paper without its dual form: every W_t is made, every gradient is autograd's."""
    n, C = len(layer.matrices), layer.batch
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    eta = (layer.rate(x) + layer.rate_bias).sigmoid() * layer.config.rate / layer.head_dim

    def f(W: list[Tensor], a: Tensor) -> Tensor:
        h = a[:, None]
        for i in range(n):
            h = h @ W[i] + W[n + i]
            h = F.gelu(h, approximate="tanh") if i < n - 1 else h
        if layer.norm_weight is None:
            return h[:, 0]
        normed = F.layer_norm(h, h.shape[-1:], eps=1e-6)
        return (a[:, None] + normed * layer.norm_weight + layer.norm_bias)[:, 0]

    W = [w.clone() for w in (*layer.matrices, *layer.biases)]
    border, out = W, []
    for t in range(len(x)):
        if t % C == 0:
            border = W
        learning = border if layer.config.inner_norm else border[:n]
        loss = (f(border, k[t]) - v[t]).square().sum() / 2
        grads = torch.autograd.grad(loss, learning, create_graph=True)
        scale = eta[t, :, None, None]
        W = [w - scale * g for w, g in zip(W, grads)] + W[len(grads) :]  # noqa: B905
        out.append(f(W, q[t]).flatten())
    z = torch.stack(out)
    return layer.out(F.layer_norm(z, z.shape[-1:], eps=1e-6) * layer.post_norm)


@pytest.mark.parametrize("T", (1, 3, 16, 17, 33))
@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_the_dual_form_equals_the_primal_one(inner: str, T: int) -> None:
    layer = made(TTTConfig(heads=2, inner=inner, mini_batch=16))
    assert isinstance(layer, TTT)
    (x,) = documents(T)
    x.requires_grad_()
    same(layer, primal(layer, x), x)


def bare(mini_batch: int) -> TTT:
    layer = made(TTTConfig(heads=2, inner_norm=False, mini_batch=mini_batch))
    assert isinstance(layer, TTT)
    with torch.no_grad():
        for w in (*layer.matrices, *layer.biases):
            w.zero_()
    return layer


def learnt(layer: TTT, q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> Tensor:
    return layer._first((q, k, v, eta[..., None]))


def test_one_token_a_batch_is_the_delta_rule_and_one_batch_is_linear_attention() -> None:
    """Theorem 1 of the paper, and its neighbour: the inner models without norm and bias."""
    q, k, v = torch.randn(3, 1, 12, 2, D // 2, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    eta = torch.rand(1, 12, 2, dtype=torch.float64)
    got = learnt(bare(1), q, k, v, eta)
    torch.testing.assert_close(got, delta_rule(q, k, v, eta)[0], **TOL)
    got = learnt(bare(12), q, k, v, torch.ones_like(eta))
    torch.testing.assert_close(got, linear_attention(q, k, v)[0], **TOL)


def omega(layer: Atlas, x: Tensor) -> Tensor:
    """The window's gradient by autograd, then momentum, Newton-Schulz and decay, token by token."""
    c, C = layer.config, layer.batch
    q, k, v = layer.qkv(x).view(len(x), 3, layer.heads, -1).unbind(1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    raw = layer.gates(x).view(len(x), 4, layer.heads) + layer.gate_bias
    alpha, eta, theta, gamma = raw.sigmoid().unbind(1)
    M = x.new_zeros(layer.heads, layer.features, layer.head_dim)
    S, border, out = torch.zeros_like(M), M, []
    for t in range(len(x)):
        if t % C == 0:
            border = M
        inner = border if border.requires_grad else border.requires_grad_()
        loss = x.new_zeros(())
        for i in range(max(0, t - c.window + 1), t + 1):
            miss = (layer.phi(k[i])[:, None] @ inner)[:, 0] - v[i]
            loss = loss + (gamma[i] * miss.square().sum(-1)).sum() / 2
        (grad,) = torch.autograd.grad(loss, inner, create_graph=True)
        scale = lambda g, t=t: g[t, :, None, None]
        S = (scale(theta) * S if c.momentum else 0) + grad
        M = scale(alpha) * M - scale(eta) * newton_schulz(S, c.steps)
        out.append((layer.phi(q[t])[:, None] @ M)[:, 0])
    y = F.layer_norm(torch.stack(out), (layer.head_dim,), eps=1e-6) * layer.norm_weight
    return layer.out(y.flatten(1))


@pytest.mark.parametrize(
    "settings,T",
    [
        ({"window": 3, "mini_batch": 4, "degree": 2}, 9),
        ({"window": 6, "mini_batch": 4, "steps": 2}, 14),
        ({"window": 1, "mini_batch": 5, "steps": 0}, 11),
        ({"window": 4, "mini_batch": 3, "momentum": False, "steps": 0}, 8),
        ({"window": 2, "mini_batch": 16}, 1),
    ],
)
def test_atlas_equals_its_step_form(settings: dict, T: int) -> None:
    layer = made(AtlasConfig(heads=2, **settings))
    assert isinstance(layer, Atlas)
    if not layer.config.momentum:
        with torch.no_grad():
            layer.gate_bias[2] = 0
    (x,) = documents(T)
    x.requires_grad_()
    same(layer, omega(layer, x), x)


def test_atlas_without_window_momentum_and_muon_is_the_delta_rule() -> None:
    layer = made(AtlasConfig(heads=2, window=1, mini_batch=1, momentum=False, steps=0))
    assert isinstance(layer, Atlas)
    q, k, v = torch.randn(3, 1, 12, 2, D // 2, dtype=torch.float64)
    k, eta = F.normalize(k, dim=-1), torch.rand(1, 12, 2, dtype=torch.float64)
    gates = torch.stack((torch.ones_like(eta), eta, eta, torch.ones_like(eta)), -1)
    got = layer._first((q, k, v, gates))
    torch.testing.assert_close(got, delta_rule(q, k, v, eta)[0], **TOL)


def test_newton_schulz_makes_singular_values_near_one() -> None:
    S = torch.randn(5, 12, 4, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(S, 5))
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(newton_schulz(torch.zeros_like(S), 5), torch.zeros_like(S))
