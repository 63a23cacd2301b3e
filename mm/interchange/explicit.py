"""A model's settings with those filled in that a config may leave to its width. D model."""

from __future__ import annotations

from typing import Any

from mm.model.backbones.stack import StackConfig
from mm.model.ffn.mlp import MlpConfig
from mm.model.ffn.moe import MoeConfig
from mm.model.ffn.swiglu import SwiGLUConfig
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.mixers.linear_attention.delta_rule import DeltaRuleConfig, default_heads
from mm.model.mixers.linear_attention.linear_attention import LinearAttentionConfig
from mm.model.mixers.ssm.mamba import MambaConfig
from mm.model.mixers.ssm.rg_lru import RGLRUConfig
from mm.model.model import LmConfig


def make_explicit(lm: LmConfig) -> LmConfig:
    """The same model, whose widths, heads and factors are numbers where a family has them."""
    D, stack, changes = lm.d_model, lm.backbone, {}
    if isinstance(stack, StackConfig):
        mixers = {word: explicit_mixer(stack.mixer(word), D) for word in stack.words()}
        more = {"mixers": mixers, "ffn": explicit_ffn(stack.ffn, D)}
        changes["backbone"] = stack.model_copy(update=more)
    if lm.embedder.kind == "sum":
        given: Any = lm.embedder
        scale = D**0.5 if given.scale is None else given.scale
        changes["embedder"] = given.model_copy(update={"scale": scale})
    return lm.model_copy(update=changes)


def explicit_ffn(config: Any, D: int) -> Any:
    """A feed-forward layer's settings with its width."""
    if isinstance(config, SwiGLUConfig | MlpConfig | MoeConfig):
        return config.model_copy(update={"hidden": config.width(D)})
    return config


def explicit_mixer(config: Any, D: int) -> Any:
    """A mixer's settings with heads and widths."""
    changes: dict[str, Any] = {}
    if isinstance(config, AttentionConfig):
        H, G, K = config.sizes(D)
        changes = {"heads": H, "kv_heads": G, "head_dim": K}
        if config.query_scale == K**-0.5:
            changes["query_scale"] = None
    if isinstance(config, MambaConfig):
        changes = {"rank": config.rank or -(-D // 16)}
    if isinstance(config, RGLRUConfig):
        changes = {"width": config.width or D}
    if isinstance(config, LinearAttentionConfig):
        H = config.heads
        key_dim = config.key_dim or int(D * config.expand_key / H)
        changes = {"key_heads": config.key_heads or H, "key_dim": key_dim}
    if isinstance(config, DeltaRuleConfig):
        H = config.heads or default_heads(D, config.key_dim)
        K = config.key_dim or D // H
        changes = {"heads": H, "key_heads": config.key_heads or H, "key_dim": K}
        changes["value_dim"] = config.value_dim or K
    return config.model_copy(update=changes)
