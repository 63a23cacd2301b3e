"""Our recurrent and hybrid models against `transformers`, same weights: logits to 1e-4.

Model by model where our stack can be wired as theirs, else the layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import (
    HIDDEN,
    B,
    D,
    T,
    assert_same_logits,
    copy_block,
    copy_lightning,
    copy_model,
    ours,
    peer,
    plain_peers,
)

from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx

__all__ = ["plain_peers"]  # a fixture of every test here

LLAMA = ("input_layernorm", "post_attention_layernorm")


def applied(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x, Ctx(Layout.plain(B, T), Causal())).y


def test_mamba() -> None:
    theirs = peer("mamba", "Mamba", num_hidden_layers=2, state_size=8)
    model = ours("2*mamba", {"mamba": {"states": 8}}, ffn=None)
    copy_model(model, theirs, ("norm",), mlp=None)
    assert_same_logits(theirs, model)


def test_falcon_mamba() -> None:
    """Step size, B and C are normed without a scale."""
    theirs = peer("falcon_mamba", "FalconMamba", num_hidden_layers=2, state_size=8)
    model = ours("2*mamba", {"mamba": {"states": 8, "norms": True}}, ffn=None)
    copy_model(model, theirs, ("norm",), mlp=None)
    assert_same_logits(theirs, model)


def test_mamba2() -> None:
    """In chunks of 16 there, in ours here."""
    theirs = peer(
        "mamba2",
        "Mamba2",
        num_hidden_layers=2,
        state_size=8,
        num_heads=4,
        head_dim=2 * D // 4,
        n_groups=1,
        chunk_size=16,
    )
    model = ours("2*mamba2", {"mamba2": {"heads": 4, "key_dim": 8}}, ffn=None)
    copy_model(model, theirs, ("norm",), mlp=None)
    assert_same_logits(theirs, model)


def test_recurrent_gemma() -> None:
    """Griffin: two recurrent blocks, then one of local attention with half of each head rotated.

    Places count from 1 there: at place 0 the peer leaves out the factor sqrt(1 - a^2) of the
    paper's eq. 4, which ours keeps. The cap of the logits is applied here: our head has none.
    """
    theirs = peer(
        "recurrent_gemma",
        "RecurrentGemma",
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=2 * HIDDEN,
        attention_window_size=9,
        logits_soft_cap=3.0,
    )
    local = {
        "heads": 4,
        "kv_heads": 1,
        "qk_norm": False,
        "window": 9,
        "position": {"kind": "rope", "fraction": 0.5},
    }
    model = ours(
        "2*rg_lru local_attention",
        {"local_attention": local},
        ffn={"kind": "swiglu", "hidden": HIDDEN, "activation": "gelu_tanh"},
        bias=True,
    )
    norms = ("temporal_pre_norm", "channel_pre_norm")
    copy_model(model, theirs, norms, mlp="mlp_block", zero_centred=True, scaled=True)
    places = torch.arange(1, T + 1)[None]
    after = lambda x: 3 * torch.tanh(x / 3)
    assert_same_logits(theirs, model, after, scaled=True, position_ids=places.expand(B, -1))


def test_qwen3_next() -> None:
    """Three Gated DeltaNet layers to one of gated attention, a quarter of each head rotated."""
    theirs = peer(
        "qwen3_next",
        "Qwen3Next",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        intermediate_size=HIDDEN,
        mlp_only_layers=[0, 1, 2, 3],
        num_experts=0,
    )
    attention = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "position": {"kind": "rope", "fraction": 0.25},
    }
    model = ours(
        "3*gated_deltanet gated_attention",
        {
            "gated_deltanet": {"heads": 2, "key_dim": 16, "value_dim": 24},
            "gated_attention": attention,
        },
    )
    copy_model(model, theirs, LLAMA, zero_centred=True)
    assert_same_logits(theirs, model)


def test_jamba() -> None:
    """Mamba with inner norms and attention without positions, dense feed-forward layers."""
    theirs = peer(
        "jamba",
        "Jamba",
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=HIDDEN,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
    )
    model = ours(
        "jamba_mamba nope_attention jamba_mamba",
        {
            "jamba_mamba": {"states": 8},
            "nope_attention": {"heads": 4, "kv_heads": 2, "qk_norm": False},
        },
    )
    copy_model(model, theirs, ("input_layernorm", "pre_ff_layernorm"), mlp="feed_forward")
    assert_same_logits(theirs, model)


def test_olmo_hybrid_gated_delta_net_layer() -> None:
    """One layer, with writing strengths up to 2.

    The model's attention layers norm after the branch only, which differs from layer to layer.
    """
    theirs = peer(
        "olmo_hybrid",
        "OlmoHybrid",
        num_hidden_layers=2,
        num_attention_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        intermediate_size=HIDDEN,
        layer_types=["linear_attention", "full_attention"],
    )
    delta = {"heads": 4, "key_dim": 12, "value_dim": 20, "negative_eigenvalues": True}
    model = ours("gated_deltanet", {"gated_deltanet": delta})
    block, layer = model.backbone.layers[0], theirs.model.layers[0]
    with torch.no_grad():
        copy_block(block, layer, LLAMA, "mlp")
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(applied(block, x), layer(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", [1, 3])
def test_minimax_lightning_attention(index: int) -> None:
    """The mixer, whose rates fall with depth; MiniMax wires its branches in another way."""
    theirs = peer(
        "minimax",
        "MiniMax",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=HIDDEN,
        num_local_experts=2,
        block_size=16,
    )
    source = theirs.model.layers[index].self_attn
    rate = 1 - index / (4 - 1 + 1e-5) + 1e-5
    model = ours("lightning_attention", {"lightning_attention": {"heads": 4, "rate": rate}})
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        copy_lightning(mixer, source)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
    expected, _ = source(x, position_embeddings=None, attention_mask=None)
    torch.testing.assert_close(applied(mixer, x), expected, rtol=0, atol=1e-4)
