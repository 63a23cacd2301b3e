"""The presets of linear attention against their papers' equations, and against peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import TOL, D, alone, apply, documents, packed
from torch import Tensor

from mm.kernels.linear_attention import linear_attention
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import LinearMixer, init_weights
from mm.model.mixers.linear_attention.linear_attention import LinearAttentionConfig

PRESETS = (
    "linear_attention",
    "based",
    "retnet",
    "gla",
    "hgrn2",
    "mamba2",
    "lightning_attention",
    "simple_gla",
)


def build(preset: str, **settings: Any) -> LinearMixer:
    """The preset in float64, every parameter away from its initial value."""
    torch.manual_seed(3)
    config = StackConfig(pattern=preset).mixer(preset)
    layer = config.model_copy(update=settings).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.double()


def heads(x_TW: Tensor, n: int) -> Tensor:
    """`(T, W)` to `(n, T, W / n)`."""
    return x_TW.view(len(x_TW), n, -1).transpose(0, 1)


def split(layer: LinearMixer, x: Tensor) -> tuple[Tensor, ...]:
    return layer.qkv(x).split(layer.sizes, dim=-1)


def recurrence(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """``S = a S + k v^T; o = q S``, token by token. ``a`` `(H, T, K or 1)`."""
    S, out = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = a[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None]
        out.append(torch.einsum("hk,hkv->hv", q[:, t], S))
    return torch.stack(out, 1)


def joined(o: Tensor) -> Tensor:
    return o.transpose(0, 1).flatten(1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    return weights.tril() / (weights.tril().sum(-1, keepdim=True) + 1e-6) @ v


def linear_attention_(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(t, 4) for t in split(layer, x))
    return joined(weighted((F.elu(q) + 1) @ (F.elu(k) + 1).mT, v))


def based(layer: Any, x: Tensor) -> Tensor:
    """The Taylor polynomial of the exponential, without any feature."""
    q, k, v = (heads(t, 4) for t in split(layer, x))
    assert q.shape[-1] == 16
    s = q @ k.mT / 4
    return joined(weighted(1 + s + s**2 / 2, v))


def retnet(layer: Any, x: Tensor) -> Tensor:
    """The parallel form with complex phases: ``(Q e^{in theta}) (K e^{-im theta}) * D``."""
    q, k, v = (heads(t, 4) for t in split(layer, x))
    K, T = q.shape[-1], len(x)
    theta = 10000.0 ** (-2 * torch.arange(K // 2, dtype=torch.float64) / K)
    n = torch.arange(T, dtype=torch.float64)
    angle = n[:, None] * theta  # the table of positions is float32
    phase = torch.complex(angle.cos().float().double(), angle.sin().float().double())
    qc, kc = (torch.complex(*t.chunk(2, -1)) * phase for t in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    decay = (gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)).tril()
    o = ((qc @ kc.conj().mT).real / K**0.5 * decay) @ v
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return joined(o) * F.silu(layer.gate(x))


def gla(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(t, 4) for t in split(layer, x))
    a = torch.sigmoid(layer.decay(layer.decay_in(x)) + layer.decay_bias) ** (1 / 16)
    o = recurrence(q * q.shape[-1] ** -0.5, k, v, heads(a, 4))
    return joined(rms(o, layer.norm.weight)) * F.silu(layer.gate(x))


def simple_gla(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(t, 4) for t in split(layer, x))
    a = torch.sigmoid(layer.decay(x) + layer.decay_bias) ** (1 / 16)
    o = recurrence(q * q.shape[-1] ** -0.5, k, v, heads(a, 4))
    return joined(rms(o, layer.norm.weight)) * F.silu(layer.gate(x))


def hgrn2(layer: Any, x: Tensor) -> Tensor:
    q, _, v = split(layer, x)
    bound = 0.0 if layer.bound is None else layer.bound.sigmoid()  # of the first layer: 0
    a = bound + (1 - bound) * torch.sigmoid(layer.decay(x) + layer.decay_bias)
    o = recurrence(*(heads(t, 4) for t in (F.silu(q), 1 - a, v, a)))
    return rms(joined(o), layer.norm.weight)


def lightning_attention(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(F.silu(t), 4) for t in split(layer, x))
    a = torch.exp(-torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64))
    o = recurrence(q, k, v, a[:, None, None].expand(4, len(x), 1))
    return rms(joined(o), layer.norm.weight) * layer.gate(x).sigmoid()


def mamba2(layer: Any, x: Tensor) -> Tensor:
    u = F.pad(layer.qkv(x), (0, 0, 3, 0))
    u = sum(layer.conv.weight[j] * u[j : j + len(x)] for j in range(4)) + layer.conv.bias
    c, b, v = F.silu(u).split(layer.sizes, dim=-1)
    dt = F.softplus(layer.decay(x) + layer.decay_bias)
    a = torch.exp(-dt * layer.log_rate.exp())
    v = heads(v, 4)
    shared = [t[None].expand(4, -1, -1) for t in (c, b)]
    o = recurrence(*shared, v * dt.T[..., None], a.T[..., None]) + layer.skip[:, None, None] * v
    return rms(joined(o) * F.silu(layer.gate(x)), layer.norm.weight)


EQUATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear_attention": linear_attention_,
    **{f.__name__: f for f in (based, retnet, gla, simple_gla, hgrn2, lightning_attention, mamba2)},
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("T", [1, 9, 70])
def test_a_preset_is_its_papers_equation(preset: str, T: int) -> None:
    layer, (doc,) = build(preset), documents(T)
    expected = layer.out(EQUATIONS[preset](layer, doc))
    torch.testing.assert_close(alone(layer, doc), expected, **TOL)


@pytest.mark.parametrize("preset", PRESETS)
def test_long_and_ragged_documents_equal_the_recurrence_with_gradients(preset: str) -> None:
    """Packed 130, 1, 64 and 65 tokens: chunk borders, groups and the one-token document."""
    layer, docs = build(preset), documents(130, 1, 64, 65)
    x, layout = packed([[(-1, docs[0], 0), (-1, docs[1], 0)], [(-1, d, 0) for d in docs[2:]]])

    def run(name: str) -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_()
        with linear_attention.using(name):
            y = apply(layer, inputs, layout).y[layout.fields.document > 0]
        weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        return y, *torch.autograd.grad((y * weight).sum(), [inputs, *layer.parameters()])

    for got, expected in zip(run("chunked"), run("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_state_does_not_grow(preset: str) -> None:
    layer = build(preset)
    assert layer.state_bytes(2, 10) == layer.state_bytes(2, 10**6) > 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_refused_guess_leaves_no_trace_whatever_it_held(preset: str, value: float) -> None:
    layer, (doc,) = build(preset), documents(6)
    with torch.no_grad():
        guess = doc[:4].clone()
        guess[2:] = value
        layout = Layout.from_rows([[Doc(4, slot=0)]])
        state = apply(layer, guess[None], layout, layer.initial_state(1, 8), draft=True).state
        x, layout = packed([[(0, doc[2:], 2)]])
        y = apply(layer, x, layout, state.accept(torch.tensor([2]))).y[0]
    torch.testing.assert_close(y, alone(layer, doc)[2:], **TOL)


def test_half_precision_stays_near() -> None:
    for preset in PRESETS:
        layer, (doc,) = build(preset), documents(70)
        expected = alone(layer, doc)
        got = apply(layer.bfloat16(), doc[None].bfloat16(), Layout.plain(1, 70)).y[0]
        assert got.dtype == torch.bfloat16
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.1, f"{preset}: {error}"


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"feature": "identity"}, "normalise"),
        ({"key": "one_minus_decay"}, "decay: channel"),
        ({"decay": "channel", "feature": "taylor"}, "taylor"),
        ({"heads": 3, "key_heads": 2}, "multiple"),
        ({"lower_bound": 0.5}, "lower_bound"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LinearAttentionConfig(**settings)


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide"):
        LinearAttentionConfig(heads=3).build(D)


def test_mamba2_begins_as_its_paper_says() -> None:
    layer = LinearAttentionConfig(heads=8, decay="step").build(D)
    init_weights(layer)
    step, rate = F.softplus(layer.decay_bias), layer.log_rate.exp()
    assert 0.99e-3 < step.min() and step.max() < 0.101
    assert 1 <= rate.min() and rate.max() <= 16


def _same(layer: LinearMixer, pairs: list[tuple[Tensor, Tensor]], T: int) -> tuple[Tensor, Tensor]:
    layer = layer.float()
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)
    x = torch.randn(2, T, D)
    return x, layer(x, Ctx(Layout.plain(2, T), Causal())).y


def _randomised(peer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return peer.float()


def test_mamba2_equals_hugging_faces_with_the_same_weights() -> None:
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    N, E = 6, 2 * D
    config = Mamba2Config(
        hidden_size=D,
        num_heads=4,
        head_dim=E // 4,
        state_size=N,
        n_groups=1,
        expand=2,
        chunk_size=8,
    )
    peer: Any = _randomised(Mamba2Mixer(config, layer_idx=0))
    layer: Any = build("mamba2", key_dim=N)
    # Theirs is ordered z, x, B, C, dt; ours queries (C), keys (B), values (x).
    z, v, b, c, dt = peer.in_proj.weight.split((E, E, N, N, 4))
    conv = lambda t: torch.cat([t.split((E, N, N))[i] for i in (2, 1, 0)])
    pairs = [
        (layer.qkv.weight, torch.cat((c, b, v))),
        (layer.gate.weight, z),
        (layer.decay.weight, dt),
        (layer.decay_bias, peer.dt_bias),
        (layer.log_rate, peer.A_log),
        (layer.skip, peer.D),
        (layer.conv.weight, conv(peer.conv1d.weight[:, 0]).T),
        (layer.conv.bias, conv(peer.conv1d.bias)),
        (layer.norm.weight, peer.norm.weight),
        (layer.out.weight, peer.out_proj.weight),
    ]
    layer.norm.eps = config.layer_norm_epsilon
    x, y = _same(layer, pairs, 37)
    with torch.no_grad():
        torch.testing.assert_close(y, peer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [0, 2])
def test_lightning_attention_equals_hugging_faces_minimax(index: int) -> None:
    pytest.importorskip("transformers")
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        num_hidden_layers=4,
        block_size=16,
        layer_types=["linear_attention"] * 4,
    )
    peer: Any = _randomised(MiniMaxLightningAttention(config, layer_idx=index))
    rate = float(peer.slope_rate[0]) / 2.0**-2
    assert math.isclose(rate, 1 - index / 3, abs_tol=1e-4)
    layer: Any = build("lightning_attention", rate=rate)
    # Theirs holds query, key and value of a head together.
    qkv = peer.qkv_proj.weight.view(4, 3, 4, D).transpose(0, 1).reshape(-1, D)
    pairs = [
        (layer.qkv.weight, qkv),
        (layer.gate.weight, peer.output_gate.weight),
        (layer.norm.weight, peer.norm.weight),
        (layer.out.weight, peer.out_proj.weight),
    ]
    x, y = _same(layer, pairs, 37)
    with torch.no_grad():
        expected, _ = peer(x, None, None)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
