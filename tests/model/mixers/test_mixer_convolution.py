"""Convolutions over time, mixed heads and the hybrid patterns equal what their papers say.

T tokens, D model, W width.
"""

from __future__ import annotations

import pytest
import torch
from laws import D, alone, documents, serve
from layer_toys import made
from torch import Tensor, nn

from mm import config as yaml_config
from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Layer
from mm.model.mixers.conv.gated_cnn import GatedCNN, GatedCNNConfig
from mm.model.mixers.conv.hyena import Hyena, HyenaConfig, long_conv
from mm.model.mixers.conv.short_conv import GatedShortConv, ShortConvConfig
from mm.model.mixers.conv.trellis import Trellis, TrellisConfig
from mm.model.mixers.wrappers.mixed_heads import MixedHeads, MixedHeadsConfig
from mm.registry import BACKBONES

TOL = {"rtol": 1e-9, "atol": 1e-10}


def reach(layer: Layer, T: int) -> list[int]:
    """How many tokens back the last output of T reads."""
    (x,) = documents(T)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(alone(layer, x)[-1].sum(), x)
    return [T - 1 - t for t in range(T) if grad[t].abs().sum() > 0]


def test_gated_cnn_equals_torch_convolutions_and_reaches_its_taps() -> None:
    layer = made(GatedCNNConfig(width=6, conv_size=3))
    assert isinstance(layer, GatedCNN)
    (x,) = documents(20)
    W = layer.inner.weight.view(12, 3, D).flip(1).transpose(1, 2)  # newest token last, as in torch
    u = nn.functional.conv1d(nn.functional.pad(x.T[None], (2, 0)), W, layer.bias)
    expected = layer.out((u[:, :6] * u[:, 6:].sigmoid())[0].T)
    torch.testing.assert_close(alone(layer, x), expected, **TOL)
    assert reach(layer, 9) == [2, 1, 0]


def test_short_conv_equals_the_peer() -> None:
    peer = pytest.importorskip("transformers.models.lfm2.modeling_lfm2")
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config

    config = Lfm2Config(hidden_size=D, num_hidden_layers=1, layer_types=["conv"], conv_bias=False)
    theirs = peer.Lfm2ShortConv(config, 0)
    ours = made(ShortConvConfig(conv_size=config.conv_L_cache)).float()
    assert isinstance(ours, GatedShortConv)
    with torch.no_grad():
        ours.inner.weight.copy_(theirs.in_proj.weight)
        ours.conv.weight.copy_(theirs.conv.weight[:, 0].T)
        ours.conv.bias.zero_()
        ours.out.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 30, D)
    got = ours(x, Ctx(Layout.plain(2, 30), Causal())).y
    torch.testing.assert_close(got, theirs(x), rtol=1e-4, atol=1e-5)


def test_short_conv_without_gates_is_linear() -> None:
    layer = made(ShortConvConfig(gates=False))
    assert isinstance(layer, GatedShortConv)
    a, b = documents(9, 9)
    with torch.no_grad():
        layer.conv.bias.zero_()
        torch.testing.assert_close(alone(layer, a + b), alone(layer, a) + alone(layer, b), **TOL)


def test_trellis_with_sparse_weights_is_an_lstm() -> None:
    """The paper's special case: zeros in the right blocks leave a recurrent network."""
    W, depth = 6, 12
    layer = made(TrellisConfig(width=W, depth=depth))
    assert isinstance(layer, Trellis)
    lstm = nn.LSTM(D, W).double()
    order = [W + i for i in range(W)] + [*range(W), *range(2 * W, 4 * W)]  # ours: forget first
    with torch.no_grad():
        layer.inner.weight[:, D:] = 0  # no input of the token before
        layer.inner.weight[:, :D] = lstm.weight_ih_l0[order]
        layer.mix.weight[:, :W] = 0  # no hidden of the token itself
        layer.mix.weight[:, W:] = lstm.weight_hh_l0[order]
        layer.bias.copy_((lstm.bias_ih_l0 + lstm.bias_hh_l0)[order])
        (x,) = documents(20)
        got = alone(layer, x)
        torch.testing.assert_close(got[:depth], layer.out(lstm(x[:depth])[0]), **TOL)
        # Later tokens: the LSTM over the last ``depth`` inputs only.
        torch.testing.assert_close(got[-1], layer.out(lstm(x[-depth:])[0][-1]), **TOL)


def test_trellis_shares_its_weights_and_reaches_its_depth() -> None:
    small, large = made(TrellisConfig(width=6, depth=3)), made(TrellisConfig(width=6, depth=7))
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    assert count(small) == count(large)
    assert reach(small, 9) == [3, 2, 1, 0]


@pytest.mark.parametrize("T", (1, 3, 63, 64, 65, 130))
def test_long_conv_equals_the_sum_with_all_gradients(T: int) -> None:
    u = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(T + 2, 3, dtype=torch.float64, requires_grad=True)
    rows = [sum(h[t - s] * u[:, s] for s in range(t + 1)) for t in range(T)]
    got, expected = long_conv(u, h), torch.stack(rows, 1)
    torch.testing.assert_close(got, expected, **TOL)
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((y * weight).sum(), (u, h)) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **TOL)


def test_hyena_equals_its_equation() -> None:
    layer = made(HyenaConfig(width=6, filter_length=8, filter_width=4, bands=2))
    assert isinstance(layer, Hyena)
    (x,) = documents(20)
    W = layer.conv.weight
    u = torch.cat((x.new_zeros(2, D), x)) @ layer.inner.weight.T
    u = sum(W[j] * u[j : j + 20] for j in range(3)) + layer.conv.bias
    b, c, v = u.chunk(3, -1)
    h = layer.filter(20)
    long = torch.stack([sum(h[t - s] * (b * v)[s] for s in range(t + 1)) for t in range(20)])
    expected = layer.out(c * (long + layer.skip * b * v))
    torch.testing.assert_close(alone(layer, x), expected, **TOL)


def test_hyena_serves_long_chunks_and_steps_as_it_trains() -> None:
    """Over the lengths at which it goes from sums to FFTs, in training and in serving."""
    layer = made(HyenaConfig(width=6, filter_length=64, filter_width=4, bands=2))
    docs = documents(90, 7)
    plan = [[[(0, 70)], [(1, 2)]], [[(0, 8), (1, 4)]], [[(0, 11)], [(1, 1)]], [[(0, 1)]]]
    with torch.no_grad():
        got = serve(layer, docs, plan, layer.initial_state(2, 96))
        for y, doc in zip(got, docs, strict=True):
            torch.testing.assert_close(y, alone(layer, doc), **TOL)
        with pytest.raises(ValueError, match="larger max_len"):
            serve(layer, docs[:1], [[[(0, 90)]]], layer.initial_state(1, 89))


def test_mixed_heads_are_heads_of_one_layer() -> None:
    """Outputs side by side before one projection equal the sum of two projections."""
    layer = made(MixedHeadsConfig.smallest())
    assert isinstance(layer, MixedHeads)
    attention, recurrent = layer.parts
    (x,) = documents(12)
    sides: list[Tensor] = []
    hooks = [
        part.out.register_forward_pre_hook(lambda _, a: sides.append(a[0].flatten(2)))
        for part in layer.parts
    ]
    got = alone(layer, x)
    [hook.remove() for hook in hooks]
    joint = torch.cat((attention.out.weight, recurrent.out.weight), 1)
    torch.testing.assert_close(got, (torch.cat(sides, -1) @ joint.T)[0], **TOL)
    cached = [part.state_bytes(1, 1000) for part in layer.parts]
    assert cached[0] > 1000 > cached[1], "only the attention heads' cache grows with the document"


@pytest.mark.parametrize(
    "name,words",
    [
        ("griffin", ["rg_lru", "rg_lru", "local_attention"]),
        ("samba", ["mamba", "local_attention"]),
        ("jamba", [*["jamba_mamba"] * 4, "nope_attention", *["jamba_mamba"] * 3]),
        ("recurformer", ["recurformer"]),
        ("xlstm", [*["mlstm"] * 7, "slstm"]),
    ],
)
def test_hybrids_are_patterns(name: str, words: list[str]) -> None:
    """Each builds, and streams its second half from its State as it reads it whole."""
    config = BACKBONES.parse(yaml_config.read(f"backbone/{name}"))
    assert config.words() == words
    layer = made(config)
    (x,) = documents(10)
    with torch.no_grad():
        plan = [[[(0, 5)]], *[[[(0, 1)]]] * 5]
        (got,) = serve(layer, [x], plan, layer.initial_state(1, 16))
        torch.testing.assert_close(got, alone(layer, x), **TOL)
