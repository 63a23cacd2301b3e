"""Whole recurrent models of `transformers` wired by our settings, same weights: logits to 1e-4."""

from __future__ import annotations

from typing import Any

import torch
from peers import (
    HIDDEN,
    SCALE,
    D,
    assert_same_logits,
    copy_norm,
    matrix,
    ours,
    peer,
    plain_peers,
)
from torch import nn

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
            copy_norm(block.channel_norm, layer.norm_ffn)
            copy_mlstm(block.mixer, layer.mlstm_layer)
            matrix(block.channel.gate_up, layer.ffn.proj_up_gate, layer.ffn.proj_up)
            matrix(block.channel.out, layer.ffn.proj_down)
    assert_same_logits(theirs, model, after=lambda x: 3 * torch.tanh(x / 3))
