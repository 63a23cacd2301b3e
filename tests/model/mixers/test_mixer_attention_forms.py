"""Attention mixers with a form of their own against their formulas written out.

The laws (test_contract.py) run them packed, served, drafted and compiled.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_toys import build, causal_softmax, heads, merged
from laws import TOL, D, alone, documents
from torch.nn import functional as F

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal
from mm.model.backbones.stack import StackConfig
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.attention.cog_attention import signed_softmax
from mm.registry import MIXERS
from mm.surgery.pool_heads import mean_pooled

# ---- multi-head latent attention ----


@pytest.mark.parametrize("query_latent", [None, 5])
def test_latent_attention_is_attention_of_raised_keys_and_values(query_latent: int | None) -> None:
    layer = build(
        "latent_attention", latent=6, rotary_dim=4, value_dim=3, query_latent=query_latent,
        position="rope",
    )  # fmt: skip
    x, K, P = documents(9)[0], 8, 4
    norm = lambda t, n: t * (t.square().mean(-1, keepdim=True) + n.eps).rsqrt() * n.weight
    c = norm(x @ layer.q_down.weight.T, layer.q_norm) if query_latent else x
    q = (c @ layer.q.weight.T).view(9, 2, K + P).transpose(0, 1)
    latent, k_rotary = (x @ layer.kv_down.weight.T).split((6, P), -1)
    latent = norm(latent, layer.kv_norm)
    angle = torch.arange(9).double()[:, None] * 10000.0 ** -(torch.arange(0, P, 2).double() / P)
    turn = lambda t: torch.view_as_real(
        torch.complex(t[..., : P // 2], t[..., P // 2 :]) * torch.exp(1j * angle)
    ).transpose(-1, -2).flatten(-2)  # fmt: skip
    logits = q[..., :K] @ (latent @ layer.key_up.mT).mT + turn(q[..., K:]) @ turn(k_rotary).T
    o = causal_softmax(logits * (K + P) ** -0.5) @ (latent @ layer.value_up)
    torch.testing.assert_close(
        alone(layer, x), merged(o) @ layer.out.weight.T, rtol=1e-6, atol=1e-7
    )


def test_latent_attention_caches_one_latent_and_one_key_a_token() -> None:
    sizes = {n: build("latent_attention", heads=n, latent=6, rotary_dim=4) for n in (2, 8)}
    tokens = lambda layer: layer.state_bytes(1, 9) - layer.state_bytes(1, 8)
    assert [tokens(layer) for layer in sizes.values()] == [(6 + 4) * 8 + 12] * 2
    full = MIXERS.get("attention")(heads=2).build(D).double()
    assert tokens(full) == 2 * D * 8 + 12


def test_latent_attention_equals_deepseek_v2_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = pytest.importorskip("transformers").DeepseekV2Config(
        hidden_size=D, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=5, kv_lora_rank=6,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=3, head_dim=4, num_hidden_layers=1,
        attn_implementation="eager", rms_norm_eps=1e-6, max_position_embeddings=64,
    )  # fmt: skip
    peer = modeling.DeepseekV2Attention(config, 0).double()
    layer = build(
        "latent_attention", latent=6, rotary_dim=4, value_dim=3, query_latent=5, position="rope"
    )
    # There pairs are (2i, 2i + 1), here (i, i + P/2).
    order = torch.tensor([0, 2, 1, 3])
    x = documents(9)[0].float().double()
    with torch.no_grad():
        q = peer.q_b_proj.weight.view(2, 12, 5)
        layer.q.weight.copy_(torch.cat((q[:, :8], q[:, 8:][:, order]), 1).flatten(0, 1))
        down = peer.kv_a_proj_with_mqa.weight
        layer.kv_down.weight.copy_(torch.cat((down[:6], down[6:][order])))
        layer.q_down.weight.copy_(peer.q_a_proj.weight)
        layer.q_norm.weight.copy_(peer.q_a_layernorm.weight)
        layer.kv_norm.weight.copy_(peer.kv_a_layernorm.weight)
        up = peer.kv_b_proj.weight.view(2, 11, 6)
        layer.key_up.copy_(up[:, :8])
        layer.value_up.copy_(up[:, 8:].mT)
        layer.out.weight.copy_(peer.o_proj.weight)
        rotary = modeling.DeepseekV2RotaryEmbedding(config)
        places = torch.arange(9)[None]
        mask = torch.full((9, 9), -math.inf, dtype=torch.float64).triu(1)[None, None]
        expected = peer(
            x[None], attention_mask=mask, position_embeddings=rotary(x[None], places)
        )[0][0]  # fmt: skip
        torch.testing.assert_close(alone(layer, x), expected, rtol=1e-4, atol=1e-5)


# ---- KV shift ----


def test_kv_shift_mixes_each_key_and_value_with_the_one_before() -> None:
    layer, (x,) = build("kv_shift", kv_heads=1), documents(9)
    q, k, v = heads(x @ layer.qkv.weight.T, 2, 1, 1)
    before = lambda t: F.pad(t, (0, 0, 1, 0))[:, :-1]
    (a2, b2), (a1, b1) = layer.mix[..., 0].tolist()
    k, v = a1 * k + a2 * before(k), b1 * v + b2 * before(v)
    o = causal_softmax(q @ k.mT * 8**-0.5) @ v
    torch.testing.assert_close(alone(layer, x), merged(o) @ layer.out.weight.T, **TOL)


def test_kv_shift_without_a_share_of_the_past_is_attention() -> None:
    layer, plain, (x,) = build("kv_shift"), build("attention", qk_norm=False), documents(9)
    with torch.no_grad():
        layer.mix[0], layer.mix[1] = 0, 1
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "mix"})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)


def test_kv_shift_begins_with_shares_of_sum_one() -> None:
    layer = MIXERS.get("kv_shift")().build(D)
    init_weights(layer)
    torch.testing.assert_close(layer.mix.sum(0), torch.ones(2, 4))
    assert (layer.mix >= 0).all()


# ---- value residual ----


def test_value_residual_mixes_the_values_of_the_first_layer() -> None:
    """In two calls: the second layer gets what the first one published; the first its own."""
    first, second = build("value_residual", kv_heads=1), build("value_residual", kv_heads=1)
    (x,) = documents(9)
    y, ctx = x[None], Ctx(Layout.plain(1, 9), Causal())
    values = None
    for layer in (first, second):
        q, k, v = heads(y[0] @ layer.qkv.weight.T, 2, 1, 1)
        values = v if values is None else values
        a, b = layer.share.tolist()
        o = causal_softmax(q @ k.mT * 8**-0.5) @ (a * values + b * v)
        out = layer(y, ctx)
        torch.testing.assert_close(out.y[0], merged(o) @ layer.out.weight.T, **TOL)
        y, ctx = out.y, out.ctx or ctx
    assert ctx.published


def test_value_residual_begins_by_halves_and_passes_the_first_layer_by() -> None:
    layer, plain, (x,) = build("value_residual"), build("attention", qk_norm=False), documents(9)
    layer.init_weights()
    assert layer.share.tolist() == [0.5, 0.5]
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "share"})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)


# ---- differential attention ----


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_differential_attention_is_the_difference_of_two_maps(kv_heads: int) -> None:
    layer, (x,) = build("differential_attention", kv_heads=kv_heads, lambda_init=0.3), documents(9)
    q, k, v = heads(x @ layer.qkv.weight.T, 4, 2 * kv_heads, 2 * kv_heads)
    (a1, b1), (a2, b2) = layer.lambdas
    balance = (a1 @ b1).exp() - (a2 @ b2).exp() + 0.3
    outs = []
    for h in range(2):
        g = h * kv_heads // 2
        e, r = h % (2 // kv_heads), 2 // kv_heads
        value = torch.cat((v[2 * g], v[2 * g + 1]), -1)
        maps = [
            causal_softmax(q[(2 * g + s) * r + e] @ k[2 * g + s].mT * 4**-0.5) for s in range(2)
        ]
        o = (maps[0] - balance * maps[1]) @ value
        o = o * (o.square().mean(-1, keepdim=True) + layer.norm.eps).rsqrt() * layer.norm.weight
        outs.append(o * 0.7)
    torch.testing.assert_close(alone(layer, x), torch.cat(outs, -1) @ layer.out.weight.T, **TOL)


def test_differential_attention_cancels_what_both_maps_see() -> None:
    layer, (x,) = build("differential_attention"), documents(9)
    with torch.no_grad():  # equal maps and lambda = 1
        w = layer.qkv.weight.view(12, 4, D)
        w[[1, 3]], w[[5, 7]] = w[[0, 2]].clone(), w[[4, 6]].clone()
        layer.lambdas.zero_()
    layer.lambda_init = 1.0
    assert layer.balance() == 1
    assert alone(layer, x).abs().max() < 1e-6


# ---- selective attention ----


def test_selective_attention_is_the_papers_sum() -> None:
    layer, (x,) = build("selective_attention"), documents(9)
    q, k, v = heads(x @ layer.qkv.weight.T, 2, 2, 2)
    logits = q @ k.mT * 8**-0.5
    masked = x.new_zeros(9, 9)
    for i in range(9):
        for j in range(i + 1):
            for by in range(j + 1, i):  # tokens between: neither itself nor the reader
                masked[i, j] += logits[0, by, j].relu() if j > 0 else 0.0
    o = causal_softmax(logits - masked) @ v
    torch.testing.assert_close(alone(layer, x), merged(o) @ layer.out.weight.T, **TOL)
    assert masked.max() > 0.1, "the test would hold without selection, too"


# ---- negative weights ----


def test_signed_softmax_has_rows_of_absolute_sum_one_far_out() -> None:
    g = torch.Generator().manual_seed(0)
    for size in (1.0, 30.0, 1e3):
        logits = size * torch.randn(3, 7, dtype=torch.float64, generator=g)
        p = signed_softmax(logits, None)
        torch.testing.assert_close(p.abs().sum(-1), torch.ones(3, dtype=torch.float64))
        assert torch.equal(p.sign()[p != 0], logits.sign()[p != 0]) and (p < 0).any()
    raw = logits.clamp(-3, 3).requires_grad_()
    expected = raw.sign() * raw.abs().exp() / raw.abs().exp().sum(-1, keepdim=True)
    torch.testing.assert_close(signed_softmax(raw, None), expected)
    some = torch.randn(2, 5, dtype=torch.float64, generator=g).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: signed_softmax(t, None), some)


@pytest.mark.parametrize("T", [9, 300])
def test_cog_attention_in_blocks_is_the_formula(T: int) -> None:
    layer, (x,) = build("cog_attention", kv_heads=1), documents(T)
    q, k, v = heads(x @ layer.qkv.weight.T, 2, 1, 1)
    logits = q @ k.mT * 8**-0.5
    e = logits.abs().exp().masked_fill(torch.ones(T, T).triu(1).bool(), 0)
    o = (e * logits.sign() / e.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(alone(layer, x), merged(o) @ layer.out.weight.T, **TOL)


# ---- keys that are their own queries ----


def test_kv_only_is_attention_with_tied_projections() -> None:
    layer, tied, (x,) = build("kv_only"), build("attention", qk_norm=False), documents(9)
    k, v = layer.kv.weight.chunk(2)
    with torch.no_grad():
        tied.qkv.weight.copy_(torch.cat((k, k, v)))
        tied.out.weight.copy_(layer.out.weight)
    torch.testing.assert_close(alone(layer, x), alone(tied, x), **TOL)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(layer) * 4 == count(tied) * 3


# ---- fewer key heads for a trained model ----


def test_mean_pooled_key_heads_are_the_means_and_the_rest_stays() -> None:
    layer, (x,) = build("attention", heads=4, head_dim=4, qk_norm=False), documents(9)
    small = build("attention", heads=4, kv_heads=2, head_dim=4, qk_norm=False)
    small.load_state_dict(mean_pooled(layer, 2))
    q, k, v = heads(x @ layer.qkv.weight.T, 4, 4, 4)
    pool = lambda t: torch.stack((t[:2].mean(0), t[2:].mean(0))).repeat_interleave(2, 0)
    o = causal_softmax(q @ pool(k).mT / 2) @ pool(v)
    torch.testing.assert_close(alone(small, x), merged(o) @ layer.out.weight.T, **TOL)
    same = mean_pooled(layer, 4)  # as many heads as before: bit for bit
    assert all(torch.equal(t, same[n]) for n, t in layer.state_dict().items())
    assert small.state_bytes(1, 9) - 12 * 9 - 8 == (layer.state_bytes(1, 9) - 12 * 9 - 8) // 2


def test_equal_heads_pool_to_the_same_model_of_a_stack() -> None:
    stack = lambda kv: StackConfig(
        pattern="attention rg_lru", ffn=None,
        mixers={"attention": {"heads": 4, "kv_heads": kv}, "rg_lru": {"heads": 2}},
    ).build(D)  # fmt: skip
    large, small, (x,) = stack(4), stack(1), documents(6)
    init_weights(large.double())
    with torch.no_grad():  # every key head the same, every value head the same
        w = large.layers[0].mixer.qkv.weight.view(12, 4, D)
        w[4:8], w[8:] = w[4].clone(), w[8].clone()
    small.double().load_state_dict(mean_pooled(large, 1))
    torch.testing.assert_close(alone(small, x), alone(large, x), **TOL)
    with pytest.raises(UserError, match="4 key heads do not make 3 groups"):
        mean_pooled(large, 3)
    with pytest.raises(UserError, match="no attention layer"):
        mean_pooled(build("kv_only"), 1)


def test_head_temperatures_scale_the_logits_and_begin_at_one() -> None:
    none = {"kind": "none", "temperature": True}
    layer, (x,) = build("attention", qk_norm=False, position=none), documents(9)
    q, k, v = heads(x @ layer.qkv.weight.T, 2, 2, 2)
    logits = q @ k.mT * 8**-0.5 * layer.position.temperature[:, None, None]
    expected = merged(causal_softmax(logits) @ v) @ layer.out.weight.T
    torch.testing.assert_close(alone(layer, x), expected, **TOL)
    plain = build("attention", qk_norm=False)
    init_weights(layer.position)
    plain.load_state_dict({n: layer.state_dict()[n] for n in plain.state_dict()})
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)
