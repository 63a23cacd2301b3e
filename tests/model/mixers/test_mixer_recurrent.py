"""mLSTM, sLSTM and the classic recurrent networks equal the equations of their papers.

And the peers that are at hand. T tokens, D model, W width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from laws import D, alone, documents
from layer_toys import made
from torch import Tensor

from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Layer, init_weights
from mm.model.mixers.linear_attention.mlstm import MLSTM, MLSTMConfig
from mm.model.mixers.rnn.echo_state import EchoState, EchoStateConfig
from mm.model.mixers.rnn.gru import GRU, GRUConfig
from mm.model.mixers.rnn.lem import LEM, LEMConfig
from mm.model.mixers.rnn.scrn import SCRN, SCRNConfig
from mm.model.mixers.rnn.slstm import SLSTM, SLSTMConfig
from mm.model.mixers.rnn.unitary import Unitary, UnitaryConfig
from mm.registry import MIXERS

LENGTHS = (1, 3, 63, 64, 65, 130)
TOL = {"rtol": 1e-9, "atol": 1e-10}


def same(layer: Layer, naive: Callable[[Tensor], Tensor], T: int, **tolerance: float) -> None:
    """Outputs and the gradients of the input and of all parameters."""
    (x,) = documents(T)
    weight = torch.randn(T, D, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    got, expected = alone(layer, x), naive(x)
    torch.testing.assert_close(got, expected, **(tolerance or TOL))
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or TOL))


def matrix_memory(layer: MLSTM, x: Tensor) -> Tensor:
    """Eq. 19-27 of the paper without a stabiliser, a token at a time."""
    H, K, V = layer.heads, layer.key_dim, layer.value_dim
    q, k, v = layer.qkv(x).split(layer.sizes, -1)
    raw = layer.cap * ((layer.gates(x) + layer.gate_bias) / layer.cap).tanh()
    i, f = raw[:, :H].exp(), raw[:, H:].sigmoid()
    q, k, v = q.view(-1, H, K) / K**0.5, k.view(-1, H, K), v.view(-1, H, V)
    C, n, out = x.new_zeros(H, K, V), x.new_zeros(H, K), []
    for t in range(len(x)):
        C = f[t, :, None, None] * C + i[t, :, None, None] * k[t, :, :, None] * v[t, :, None]
        n = f[t, :, None] * n + i[t, :, None] * k[t]
        below = (n * q[t]).sum(-1).abs().clamp_min(1)
        out.append((C * q[t, :, :, None]).sum(1) / below[:, None])
    h = F.layer_norm(torch.stack(out), (V,), eps=1e-6) * layer.norm_weight
    return layer.out(h.flatten(1) * layer.gate(x).sigmoid())


@pytest.mark.parametrize("T", LENGTHS)
def test_mlstm_equals_the_unstabilised_step_form(T: int) -> None:
    layer = made(MLSTMConfig(heads=2, input_bias=0.5))
    assert isinstance(layer, MLSTM)
    # The paper's form has no epsilon beside the bound.
    same(layer, lambda x: matrix_memory(layer, x), T, rtol=3e-5, atol=3e-5)


def test_mlstm_is_stable_where_its_gates_overflow_without_a_stabiliser() -> None:
    layer = made(MLSTMConfig(heads=2, soft_cap=None, input_bias=900.0)).float()
    x = torch.randn(1, 40, D, requires_grad=True)
    y = layer(x, Ctx(Layout.plain(1, 40), Causal())).y
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all() and grad.isfinite().all() and grad.abs().sum() > 0
    assert torch.tensor(900.0).exp().isinf()


def test_mlstm_equals_the_peer() -> None:
    peer = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    from transformers.models.xlstm.configuration_xlstm import xLSTMConfig

    if peer.external_xlstm:
        pytest.skip("needs transformers' own layer, which the xlstm package replaces")
    config = xLSTMConfig(
        hidden_size=D,
        num_heads=2,
        num_hidden_layers=1,
        autocast_kernel_dtype="float32",
        chunk_size=16,
    )
    theirs = peer.xLSTMLayer(config)
    torch.manual_seed(0)
    ours = made(MLSTMConfig(heads=2)).float()
    assert isinstance(ours, MLSTM)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
        ours.qkv.weight.copy_(torch.cat((theirs.q.weight, theirs.k.weight, theirs.v.weight)))
        gates = (theirs.igate_preact, theirs.fgate_preact)
        ours.gates.weight.copy_(torch.cat([g.weight for g in gates]))
        ours.gate_bias.copy_(torch.cat([g.bias for g in gates]))
        ours.gate.weight.copy_(theirs.ogate_preact.weight)
        ours.norm_weight.copy_(theirs.multihead_norm.weight.view(2, -1))
        ours.out.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 50, D)
    expected = theirs(x)[0]
    got = ours(x, Ctx(Layout.plain(2, 50), Causal())).y
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def scalar_memory(layer: SLSTM, x: Tensor) -> Tensor:
    """Eq. 8-14 of the paper without a stabiliser, a unit at a time."""
    H, K = layer.heads, layer.width // layer.heads
    read = layer.gates(x).view(-1, H, 4, K) + layer.bias
    c, n, h = (x.new_zeros(H, K) for _ in range(3))
    n, out = n, []
    for t in range(len(x)):
        moved = torch.stack([h[a] @ layer.recurrent[a] for a in range(H)]).view(H, 4, K)
        i, f, z, o = (read[t] + moved).unbind(1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        out.append(h)
    y = F.layer_norm(torch.stack(out), (K,), eps=1e-6).flatten(1) * layer.norm_weight
    return layer.out(y)


@pytest.mark.parametrize("T", (1, 3, 65))
def test_slstm_equals_the_unstabilised_form(T: int) -> None:
    layer = made(SLSTMConfig(width=6, heads=2))
    assert isinstance(layer, SLSTM) and layer.caps.sequential
    same(layer, lambda x: scalar_memory(layer, x), T)


def test_slstm_survives_gates_that_overflow() -> None:
    layer = made(SLSTMConfig(width=6, heads=2)).float()
    assert isinstance(layer, SLSTM)
    for bias in (-900.0, 900.0):
        with torch.no_grad():
            layer.bias[:, 0] = bias
        x = torch.randn(1, 9, D, requires_grad=True)
        y = layer(x, Ctx(Layout.plain(1, 9), Causal())).y
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_scrn_equals_its_equations(adaptive: bool) -> None:
    layer = made(SCRNConfig(width=6, context=3, adaptive=adaptive))
    assert isinstance(layer, SCRN)

    def naive(x: Tensor) -> Tensor:
        a = layer.rate.sigmoid() if layer.rate is not None else 0.95
        P, A = layer.weight_ih.split((3, D), 1)
        h, s, out = x.new_zeros(6), x.new_zeros(3), []
        for token in x:
            s = (1 - a) * layer.slow(token) + a * s
            h = (P @ s + A @ token + layer.weight_hh @ h).sigmoid()
            out.append(torch.cat((h, s)))
        return layer.out(torch.stack(out))

    for T in (1, 65):
        same(layer, naive, T)


def test_lem_equals_its_equations_and_stays_bounded() -> None:
    layer = made(LEMConfig(width=6))
    assert isinstance(layer, LEM)

    def naive(x: Tensor) -> Tensor:
        W1, W2, Wz = layer.from_y.chunk(3)
        y, z, out = x.new_zeros(6), x.new_zeros(6), []
        for token in x:
            v1, v2, vz, vy = (layer.inner(token) + layer.bias).chunk(4)
            d, e = (W1 @ y + v1).sigmoid(), (W2 @ y + v2).sigmoid()
            z = (1 - d) * z + d * (Wz @ y + vz).tanh()
            y = (1 - e) * y + e * (layer.from_z @ z + vy).tanh()
            out.append(y)
        assert torch.stack(out).abs().max() <= 1
        return layer.out(torch.stack(out))

    for T in (1, 65):
        same(layer, naive, T)


@pytest.mark.parametrize("T", LENGTHS)
def test_unitary_chunks_equal_steps_and_forget_nothing(T: int) -> None:
    layer = made(UnitaryConfig(heads=2, head_dim=3))
    assert isinstance(layer, Unitary) and not layer.caps.sequential

    def naive(x: Tensor) -> Tensor:
        s, out = torch.eye(3, dtype=x.dtype)[0].repeat(2, 1), []
        for Q in layer.rotations(x[None])[0]:
            s = (Q @ s[..., None])[..., 0]
            out.append(s.flatten())
        length = torch.stack(out).view(-1, 2, 3).norm(dim=-1)
        torch.testing.assert_close(length, torch.ones_like(length))
        return layer.out(torch.stack(out))

    same(layer, naive, T)


def test_unitary_tells_orders_apart_that_a_sum_cannot() -> None:
    """Rotations do not commute: the same tokens in another order leave another state."""
    layer = made(UnitaryConfig(heads=1, head_dim=3))
    (x,) = documents(6)
    assert not torch.allclose(alone(layer, x)[-1], alone(layer, x.flip(0))[-1])


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_low_rank_gru_is_the_dense_one_with_its_product(diagonal: bool) -> None:
    low = made(GRUConfig(width=6, rank=2, diagonal=diagonal))
    assert isinstance(low, GRU)
    dense = made(GRUConfig(width=6))
    values = {n: p for n, p in low.named_parameters() if n in dict(dense.named_parameters())}
    product = torch.cat([L @ R for L, R in zip(low.high, low.low, strict=True)])
    if low.diagonal is not None:
        product = product + torch.cat([torch.diag(d) for d in low.diagonal])
    dense.load_state_dict({**values, "weight_hh": product})
    (x,) = documents(20)
    torch.testing.assert_close(alone(low, x), alone(dense, x))
    count = sum(p.numel() for n, p in low.named_parameters() if n in ("low", "high", "diagonal"))
    assert count == 3 * (2 * 6 * 2 + 6 * diagonal) < 3 * 6 * 6


@pytest.mark.parametrize("residual", ["random", "cyclic", "identity"])
def test_a_reservoir_is_untrained_and_fades(residual: str) -> None:
    layer = made(EchoStateConfig(width=8, residual=residual))
    assert isinstance(layer, EchoState)
    assert [n for n, _ in layer.named_parameters()] == ["out.weight"]
    turn, c = layer.orthogonal, layer.config
    torch.testing.assert_close(turn @ turn.T, torch.eye(8, dtype=turn.dtype), atol=1e-6, rtol=0)
    radius = torch.linalg.eigvals(layer.recurrent).abs().max()
    assert math.isclose(float(radius), c.spectral_radius, rel_tol=1e-5)

    def naive(x: Tensor) -> Tensor:
        h, out = x.new_zeros(8), []
        for token in x:
            moved = (layer.recurrent @ h + layer.inner @ token + layer.bias).tanh()
            h = c.alpha * (turn @ h) + c.beta * moved
            out.append(h)
        return layer.out(torch.stack(out))

    same(layer, naive, 33)
    # The echo state property: what began differently ends alike.
    (x,) = documents(300)
    other = torch.cat((x[:1] + 5, x[1:]))
    gap = (alone(layer, x) - alone(layer, other)).abs().amax(-1)
    assert gap[0] > 1e-2 and gap[-1] < 1e-3 * gap[0]


# ---- HiPPO-RNN ----


def test_the_memory_of_a_hippo_rnn_is_the_legendre_projection_of_its_signal() -> None:
    torch.manual_seed(3)
    layer = MIXERS.get("hippo_rnn")(width=5, states=6).build(D)
    init_weights(layer)
    layer.double()
    T = 400
    time = torch.linspace(0, 6, T, dtype=torch.float64)
    x = (time[:, None] + torch.arange(D)).sin()[None]
    with torch.no_grad():
        y, states = layer.states(x, layer.memory.begin(1))
        f = y[0] @ layer.signal + layer.signal_bias
    # sqrt(2n + 1) times the integral over the past, in units of its length, of f P_n.
    for t in (100, 400):
        place = (2 * torch.arange(t, dtype=torch.float64) + 1) / t - 1
        direct = torch.stack(
            [
                (2 * n + 1) ** 0.5 * (f[:t] * torch.special.legendre_polynomial_p(place, n)).mean()
                for n in range(6)
            ]
        )
        kept = states[0, t - 1, 5:11]
        assert (kept - direct).abs().max() < 0.02 < direct.abs().max()
        assert states[0, t - 1, -1] == t
