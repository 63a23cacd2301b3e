"""Peers that run their own plain PyTorch code: no hub, no kernel packages. D model, T tokens."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["USE_HUB_KERNELS"] = "NO"  # before transformers is imported
for _name in ("fla", "mamba_ssm", "causal_conv1d"):
    sys.modules[_name] = None  # type: ignore[assignment]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from measure import Missing  # noqa: E402
from torch import Tensor, nn  # noqa: E402

IDS, D, LAYERS, HEADS, HIDDEN = 8192, 384, 6, 6, 1024  # the decoder of kernels.md: 16.9M parameters


def transformers() -> Any:
    try:
        import transformers as peer
    except ImportError:
        raise Missing("transformers") from None
    return peer


def llama(kind: str) -> nn.Module:
    peer = transformers()
    config = peer.LlamaConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=HIDDEN,
        vocab_size=IDS,
        use_cache=False,
        attn_implementation=kind,
    )
    return peer.LlamaForCausalLM(config)


def qwen3_next() -> nn.Module:
    """Two Gated DeltaNet layers to one of gated attention, dense feed-forward layers."""
    peer = transformers()
    config = peer.Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D // HEADS,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        intermediate_size=HIDDEN,
        mlp_only_layers=list(range(LAYERS)),
        num_experts=0,
        full_attention_interval=3,
        vocab_size=IDS,
        use_cache=False,
    )
    return peer.Qwen3NextForCausalLM(config)


def litgpt() -> nn.Module:
    try:
        from litgpt import GPT, Config  # type: ignore[import-not-found]
    except ImportError:
        raise Missing("litgpt") from None
    config = Config(
        padded_vocab_size=IDS,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **{"block_size": 512, "n_layer": LAYERS, "n_head": HEADS, "n_embd": D},
        **{"rotary_percentage": 1.0, "bias": False, "intermediate_size": HIDDEN},
    )
    return GPT(config)


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.before, self.between = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = linear(D, 3 * D), linear(D, D)
        self.up, self.down = linear(D, 3 * HIDDEN // 2), linear(3 * HIDDEN // 2, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        heads = lambda t: t.view(B, T, HEADS, D // HEADS).transpose(1, 2)
        q, k, v = map(heads, self.qkv(self.before(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.between(x))))


class PlainGPT(nn.Module):
    """What nanoGPT computes (it is no package): learned positions, LayerNorm, GELU, a tied head.

    Its feed-forward layer is as wide as has as many weights as the others' SwiGLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(IDS, D), nn.Embedding(512, D)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.last = nn.LayerNorm(D, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.dim() > 1 else nn.init.ones_(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.last(x), self.token.weight)


def fla_simple_gla() -> Callable[..., Any]:
    """flash-linear-attention's plain PyTorch file, without importing its package (Triton)."""
    hidden = sys.modules.pop("fla", None)
    found = importlib.util.find_spec("fla")
    sys.modules["fla"] = hidden  # type: ignore[assignment]
    if found is None or not found.submodule_search_locations:
        raise Missing("flash-linear-attention (pip install fla-core)")
    file = Path(found.submodule_search_locations[0]) / "ops" / "simple_gla" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_chunk_simple_gla
