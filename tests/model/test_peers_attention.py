"""Our attention models against Hugging Face `transformers`, same weights: logits to 1e-4."""

from __future__ import annotations

import torch
from peers import HIDDEN, assert_same_logits, copy_model, ours, peer, plain_peers

__all__ = ["plain_peers"]  # a fixture of every test here

LLAMA = ("input_layernorm", "post_attention_layernorm")
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 128,
}


def test_llama() -> None:
    theirs = peer("llama", "Llama", **SHAPE, rms_norm_eps=1e-5)
    model = ours("2*attention", {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": False}})
    copy_model(model, theirs, LLAMA)
    assert_same_logits(theirs, model)


def test_llama_with_scaled_rotations() -> None:
    """Llama 3.1's rule; the second half of the places is where it acts."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    }
    theirs = peer("llama", "Llama", **SHAPE, rope_parameters=rope)
    scaling = {"rule": "llama3", "factor": 8.0, "original": 20, "low": 1.0, "high": 4.0}
    position = {"kind": "rope", "scaling": scaling}
    attention = {"heads": 4, "kv_heads": 2, "qk_norm": False, "position": position}
    model = ours("2*attention", {"attention": attention})
    copy_model(model, theirs, LLAMA)
    assert_same_logits(theirs, model)


def test_qwen3() -> None:
    theirs = peer("qwen3", "Qwen3", **SHAPE, head_dim=32)
    model = ours("2*attention", {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 32}})
    copy_model(model, theirs, LLAMA)
    assert_same_logits(theirs, model)


def test_gemma2() -> None:
    """A window on every other layer, soft-caps, norms before and after each branch.

    The cap of the logits is applied here: our head has none.
    """
    theirs = peer(
        "gemma2",
        "Gemma2",
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 16, "qk_norm": False, "softcap": 2.0}
    model = ours(
        "near attention",
        {"near": {"kind": "attention", "window": 9, **attention}, "attention": attention},
        block={"kind": "prenorm", "post_norms": True},
        ffn={"kind": "swiglu", "hidden": HIDDEN, "activation": "gelu_tanh"},
    )
    order = (*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    copy_model(model, theirs, order, zero_centred=True, scaled=True)
    assert_same_logits(theirs, model, after=lambda x: 3 * torch.tanh(x / 3), scaled=True)
