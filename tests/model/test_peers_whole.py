"""Whole recurrent models of `transformers` wired by our settings, same weights: logits to 1e-4."""

from __future__ import annotations

from typing import Any

import torch
from peers import (
    HIDDEN,
    SCALE,
    D,
    assert_same_logits,
    copy_block,
    copy_lightning,
    copy_norm,
    matrix,
    ours,
    peer,
    plain_peers,
)
from torch import nn

from mm import config as yaml_config

LLAMA = ("input_layernorm", "post_attention_layernorm")
LIGHTNING = yaml_config.read("mixer/lightning_attention")
__all__ = ["plain_peers"]  # a fixture of every test here


def copy_ends(model: Any, table: torch.Tensor, norm: nn.Module, head: nn.Module) -> None:
    """Embeddings, last norm and head; what is left is not a number until it is copied."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
        model.embedder.weight.copy_(table / SCALE)
        model.heads["tokens"].weight.copy_(head.weight)
        copy_norm(model.backbone.norm, norm)


def copy_mlstm(target: Any, source: Any) -> None:
    matrix(target.qkv, source.q, source.k, source.v)
    matrix(target.gate, source.ogate_preact)
    matrix(target.out, source.out_proj)
    gates = (source.igate_preact, source.fgate_preact)
    matrix(target.gates, *gates)
    target.gate_bias.copy_(torch.cat([g.bias for g in gates]))
    target.norm_weight.copy_(source.multihead_norm.weight.view_as(target.norm_weight))


def test_xlstm() -> None:
    """Chunks of 8 there; the cap of the logits is applied here."""
    theirs = peer(
        "xlstm",
        "xLSTM",
        num_hidden_layers=2,
        num_heads=4,
        ffn_proj_factor=HIDDEN / D,
        ffn_round_up_to_multiple_of=1,
        mode="train",
        chunk_size=8,
        autocast_kernel_dtype="float32",
        output_logit_soft_cap=3.0,
    )
    model = ours("2*mlstm", {"mlstm": {"heads": 4}})
    base = theirs.backbone
    copy_ends(model, base.embeddings.weight, base.out_norm, theirs.lm_head)
    with torch.no_grad():
        for block, layer in zip(model.backbone.layers, base.blocks, strict=True):
            copy_norm(block.mixer_norm, layer.norm_mlstm)
            copy_norm(block.ffn_norm, layer.norm_ffn)
            copy_mlstm(block.mixer, layer.mlstm_layer)
            matrix(block.ffn.gate_up, layer.ffn.proj_up_gate, layer.ffn.proj_up)
            matrix(block.ffn.out, layer.ffn.proj_down)
    assert_same_logits(theirs, model, after=lambda x: 3 * torch.tanh(x / 3))


def test_olmo_hybrid() -> None:
    """Gated DeltaNet layers norm before each branch, attention layers after it.

    One attention head: queries and keys are normed over all heads there, head by head here.
    """
    theirs = peer(
        "olmo_hybrid",
        "OlmoHybrid",
        num_hidden_layers=4,
        num_attention_heads=1,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        intermediate_size=HIDDEN,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    delta = {"heads": 4, "key_dim": 12, "value_dim": 20, "negative_eigenvalues": True}
    position = {"kind": "rope", "theta": 500000.0}
    model = ours(
        "3*gated_deltanet attention",
        {"gated_deltanet": delta, "attention": {"heads": 1, "position": position}},
        blocks={"attention": {"kind": "prenorm", "pre_norms": False, "post_norms": True}},
    )
    copy_ends(model, theirs.model.embed_tokens.weight, theirs.model.norm, theirs.lm_head)
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    with torch.no_grad():
        for block, layer in zip(model.backbone.layers, theirs.model.layers, strict=True):
            copy_block(block, layer, LLAMA if hasattr(layer, "linear_attn") else after, "mlp")
    assert_same_logits(theirs, model)


def test_minimax() -> None:
    """Lightning attention, whose rates fall with depth, and softmax attention.

    The residual begins behind the norm. One expert: its weight is 1.
    """
    theirs = peer(
        "minimax",
        "MiniMax",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=HIDDEN,
        num_local_experts=1,
        num_experts_per_tok=1,
        block_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    lightning = {**LIGHTNING, "heads": 4}
    rate = lambda i: 1 - i / (4 - 1 + 1e-5) + 1e-5
    model = ours(
        "first attention third attention",
        {
            "first": {**lightning, "rate": rate(0)},
            "third": {**lightning, "rate": rate(2)},
            "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16, "qk_norm": False},
        },
        block={"kind": "prenorm", "normed_residual": True},
    )
    copy_ends(model, theirs.model.embed_tokens.weight, theirs.model.norm, theirs.lm_head)
    with torch.no_grad():
        for i, (block, layer) in enumerate(
            zip(model.backbone.layers, theirs.model.layers, strict=True)
        ):
            if i % 2:
                copy_block(block, layer, LLAMA, None)
            else:
                copy_norm(block.mixer_norm, layer.input_layernorm)
                copy_norm(block.ffn_norm, layer.post_attention_layernorm)
                copy_lightning(block.mixer, layer.self_attn)
            (gate_up,), (down,) = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            matrix(block.ffn.gate_up, gate_up)
            matrix(block.ffn.out, down)
    assert_same_logits(theirs, model)


def test_rwkv() -> None:
    """RWKV-4.

    The norm behind the embeddings is a function of the token: it is put into the table, and the
    gradient of ours is led through it.
    """
    theirs = peer(
        "rwkv",
        "Rwkv",
        num_hidden_layers=2,
        attention_hidden_size=D,
        intermediate_size=HIDDEN,
        rescale_every=0,
    )
    model = ours(
        "2*rwkv4",
        {},
        ffn={"kind": "rwkv_ffn", "hidden": HIDDEN},
        block={"kind": "prenorm", "norm": "layer"},
        norm="layer",
    )
    base = theirs.rwkv
    first = base.blocks[0].pre_ln
    copy_ends(model, first(base.embeddings.weight), base.ln_out, theirs.head)
    with torch.no_grad():
        for block, layer in zip(model.backbone.layers, base.blocks, strict=True):
            copy_norm(block.mixer_norm, layer.ln1)
            copy_norm(block.ffn_norm, layer.ln2)
            mixer, source = block.mixer, layer.attention
            names = ("receptance", "key", "value")
            mixer.mix.copy_(torch.cat([getattr(source, f"time_mix_{n}")[0] for n in names]))
            for target, name in zip(mixer.projections, names, strict=True):
                matrix(target, getattr(source, name))
            mixer.log_decay.copy_(source.time_decay)
            mixer.bonus.copy_(source.time_first)
            matrix(mixer.out, source.output)
            ffn, source = block.ffn, layer.feed_forward
            ffn.mix.copy_(torch.cat((source.time_mix_receptance[0], source.time_mix_key[0])))
            matrix(ffn.receptance, source.receptance)
            matrix(ffn.key, source.key)
            matrix(ffn.out, source.value)
    assert_same_logits(theirs, model, through=first)
