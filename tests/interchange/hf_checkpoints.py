"""Small random checkpoints that `transformers` itself writes, one a family and more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.tokenizers.text.hf import HfConfig

os.environ.setdefault("USE_HUB_KERNELS", "NO")  # read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE = {
    "hidden_size": 40,  # its square root is no power of two
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": None,
}
GPT2 = {
    "n_embd": 40,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 320,
    "n_positions": 64,
    "bos_token_id": 4,
    "eos_token_id": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 20,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEADLESS = {
    name: SHAPE[name]
    for name in "hidden_size vocab_size num_hidden_layers bos_token_id eos_token_id".split()
}
MAMBA = {**HEADLESS, "state_size": 5, "time_step_rank": 3, "layer_norm_epsilon": 1e-3}
MAMBA2 = {**HEADLESS, "state_size": 6, "num_heads": 4, "head_dim": 20, "chunk_size": 16}
GRIFFIN = {"num_attention_heads": 5, "num_key_value_heads": 1}  # half of a head is rotated

# Name -> (family, config class, class, settings).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama, rotations scaled as in 3.1": (
        "llama",
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama, yarn, biases, odd heads": (
        "llama",
        "Llama",
        {
            "rope_parameters": YARN,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "num_key_value_heads": 4,
        },
    ),
    "llama, yarn with a length of its own": (
        "llama",
        "Llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.25, "truncate": False}},
    ),
    "llama, dynamic": (
        "llama",
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 48,
        },
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9}),
    "phi3, longrope": (
        "phi3",
        "Phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.8,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 4.0, 8.0, 16.0],
            },
        },
    ),
    "mistral, window": ("mistral", "Mistral", {"sliding_window": 9, "rms_norm_eps": 1e-5}),
    "mistral, linear": (
        "mistral",
        "Mistral",
        {"sliding_window": None, "rope_parameters": LINEAR, "num_key_value_heads": 1},
    ),
    "qwen2": ("qwen2", "Qwen2", {"bos_token_id": None, "tie_word_embeddings": True}),
    "qwen3, windows by layer": (
        "qwen3",
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rms_norm_eps": 1e-5,
        },
    ),
    "olmo": ("olmo", "Olmo", {}),
    "olmo, clipped, tied": ("olmo", "Olmo", {"clip_qkv": 0.02, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "olmo3, windows and rotations by layer": (
        "olmo3",
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": ("gpt2", "GPT2", GPT2),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe", {**EXPERTS, "num_experts": 4}),
    "qwen3_moe, gates as they are": (
        "qwen3_moe",
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 4, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "mamba": ("mamba", "Mamba", MAMBA),
    "mamba, other biases": (
        "mamba",
        "Mamba",
        {**MAMBA, "use_conv_bias": False, "use_bias": True, "tie_word_embeddings": False},
    ),
    "mamba2": ("mamba2", "Mamba2", {**MAMBA2, "n_groups": 1}),
    "mamba2, groups, biases": (
        "mamba2",
        "Mamba2",
        {**MAMBA2, "n_groups": 2, "use_bias": True, "use_conv_bias": False},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        "RecurrentGemma",
        {**GRIFFIN, "num_hidden_layers": 3, "attention_window_size": 7, "lru_width": 60},
    ),
    "recurrent_gemma, biases": (
        "recurrent_gemma",
        "RecurrentGemma",
        {
            **GRIFFIN,
            "block_types": ["attention", "recurrent"],
            "attention_bias": True,
            "logits_soft_cap": 5.0,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3Next",
        {
            **EXPERTS,
            "num_experts": 4,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 5,
        },
    ),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def checkpoint(folder: Path, case: str = "llama", shard: str = "40KB", **more: Any) -> Path:
    """Write the checkpoint of a case, in several files, with a tokenizer."""
    pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    import transformers

    transformers.logging.disable_progress_bar()
    _, name, settings = CASES[case]
    values = settings if name in ("GPT2", "Mamba", "Mamba2") else {**SHAPE, **settings}
    config = getattr(transformers, f"{name}Config")(**values | more)
    torch.manual_seed(3)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).float().eval()
    with torch.no_grad():  # nothing stays at zero or one
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.add_(0.2 * noise) if p.dim() < 2 else p.copy_(noise * p.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = HfConfig.smallest_tokenizer()
    (folder / "tokenizer.json").write_bytes(tokenizer.source)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
