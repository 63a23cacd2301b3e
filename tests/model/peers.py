"""Weights of Hugging Face `transformers` models copied into ours, for the numerical oracles.

B rows, T tokens, D model, H heads, K key width, V value width.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm.batch import Batch
from mm.layout import Layout
from mm.model.mixers.attention.attention import Attention
from mm.model.mixers.linear_attention.delta_rule import DeltaRule
from mm.model.mixers.linear_attention.linear_attention import LinearAttention
from mm.model.mixers.ssm.mamba import Mamba
from mm.model.mixers.ssm.rg_lru import RGLRU
from mm.model.model import LmConfig, Model
from mm.vocabulary import RESERVED

os.environ.setdefault("USE_HUB_KERNELS", "NO")  # read when transformers is imported
D, IDS, B, T = 64, RESERVED + 256, 2, 40
SCALE = D**0.5  # our embedder multiplies by it; so do the Gemmas
HIDDEN = 96  # of every feed-forward layer
# Packages whose kernels a peer would take in place of its own PyTorch code.
FAST = ("fla", "mamba_ssm", "causal_conv1d", "mambapy", "kernels", "flash_attn")


@pytest.fixture(autouse=True)
def plain_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers run their own PyTorch code: no hub, no kernel packages."""
    for name in FAST:
        monkeypatch.setitem(sys.modules, name, None)


def peer(family: str, model: str, **config: Any) -> Any:
    """A small `transformers` model in fp32 with random weights.

    Norms and biases are away from their initial values; skips by name where it is not installed.
    """
    pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
    import transformers

    cls = getattr(transformers, f"{model}Config", None)
    if cls is None:
        pytest.skip(f"this transformers has no {family}")
    shared = {
        "hidden_size": D,
        "vocab_size": IDS,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "use_cache": False,
    }
    torch.manual_seed(3)
    made = getattr(transformers, f"{model}ForCausalLM")(cls(**shared | config)).float().eval()
    scatter(made)
    return made


def scatter(module: nn.Module) -> None:
    """Matrices of unit gain; vectors and rates moved away from zeros and ones."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() < 2 or name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
            elif "embed" in name:
                p.normal_()
            else:
                p.normal_(std=p.shape[-1] ** -0.5)


def ours(pattern: str, mixers: Mapping[str, Any], bias: bool = False, **backbone: Any) -> Model:
    """Our language model of the same size."""
    ffn = {"kind": "swiglu", "hidden": HIDDEN}
    stack = {"kind": "stack", "pattern": pattern, "mixers": mixers, "ffn": ffn} | backbone
    linear = {"kind": "dense", "bias": bias}
    return LmConfig(d_model=D, backbone=stack, linear=linear).build().float().eval()


def assert_same_logits(
    theirs: Any,
    model: Model,
    after: Callable[[Tensor], Tensor] = lambda x: x,
    scaled: bool = False,
    through: Callable[[Tensor], Tensor] | None = None,
    **call: Any,
) -> None:
    """Logits within 1e-4 of each other, gradients of the embeddings within 1e-3 of their size.

    ``after``: what the peer does to logits; ``scaled``: as in `copy_model`; ``through``: what the
    peer does to its table, which is in ours already; ``call``: further arguments of the peer.
    """
    assert all(p.isfinite().all() for p in model.parameters()), "a weight was not copied"
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(IDS, (B, T), generator=g)
    weights = torch.randn(B, T, IDS, generator=g) / (B * T)
    expected = theirs(input_ids=ids, **call).logits
    none = torch.full((B, T, 1), -1, dtype=torch.int32)
    batch = Batch(Layout.plain(B, T), ids.int()[..., None], none, torch.zeros(B, T))
    dist = model(batch, loss=False).heads["tokens"].dist
    assert dist is not None and dist.logits is not None
    got = after(dist.logits.view(B, T, IDS))
    assert expected.std() > 0.1, "logits near zero would agree with anything"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    (moved,) = torch.autograd.grad((got * weights).sum(), model.embedder.weight)
    table = theirs.get_input_embeddings().weight
    (wanted,) = torch.autograd.grad((expected * weights).sum(), table)
    moved = moved if scaled else moved / SCALE
    if through is not None:
        (moved,) = torch.autograd.grad(through(table), table, moved)
    assert (moved - wanted).norm() < 1e-3 * wanted.norm()


# ---- copying ----


def copy_model(
    model: Model,
    theirs: Any,
    norms: tuple[str, ...],
    mlp: str | None = "mlp",
    zero_centred: bool = False,
    scaled: bool = False,
) -> None:
    """Everything of a decoder.

    ``norms``: the layer's norms in our order (before the mixer, after it if post-normed, before the
    ffn, after it); ``scaled``: the peer multiplies embeddings by sqrt(D), too.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
        weight = theirs.get_input_embeddings().weight
        model.embedder.weight.copy_(weight if scaled else weight / SCALE)
        model.heads["tokens"].weight.copy_(theirs.get_output_embeddings().weight)
        base = theirs.base_model
        last = next(
            getattr(base, name)
            for name in ("norm", "norm_f", "final_norm", "final_layernorm")
            if hasattr(base, name)
        )
        copy_norm(model.backbone.norm, last, zero_centred)
        for block, layer in zip(model.backbone.layers, base.layers, strict=True):
            copy_block(block, layer, norms, mlp, zero_centred)


def copy_block(
    block: Any, layer: Any, norms: tuple[str, ...], mlp: str | None, zero_centred: bool = False
) -> None:
    """Norms, mixer and feed-forward layer."""
    slots = (block.mixer_norm, block.mixer_post_norm, block.ffn_norm, block.ffn_post_norm)
    for target, name in zip([s for s in slots if s is not None], norms, strict=True):
        copy_norm(target, getattr(layer, name), zero_centred)
    for name in ("self_attn", "linear_attn", "mixer", "temporal_block", "mamba"):
        if hasattr(layer, name):
            copy_mixer(block.mixer, getattr(layer, name), zero_centred)
    if mlp is not None:
        feed = getattr(layer, mlp)
        matrix(block.ffn.gate_up, feed.gate_proj, feed.up_proj)
        matrix(block.ffn.out, feed.down_proj)


def copy_norm(target: Any, source: Any, zero_centred: bool = False) -> None:
    """Scale and epsilon; a zero-centred peer multiplies by ``1 + weight``."""
    target.weight.copy_(source.weight + 1 if zero_centred else source.weight)
    target.eps = getattr(source, "variance_epsilon", getattr(source, "eps", None))
    if hasattr(target, "bias"):
        target.bias.copy_(source.bias)


def matrix(target: Any, *sources: nn.Linear | Tensor) -> None:
    """Stack the rows of linear layers (or of weights) into one; a missing bias is zero."""
    weights = [s if isinstance(s, Tensor) else s.weight for s in sources]
    target.weight.copy_(torch.cat(weights))
    if target.bias is not None:
        target.bias.copy_(
            torch.cat(
                [
                    s.weight.new_zeros(s.weight.shape[0]) if s.bias is None else s.bias
                    for s in sources
                    if isinstance(s, nn.Linear)
                ]
            )
        )


def conv_weight_of(weight_C1K: Tensor) -> Tensor:
    """`(C, 1, K)` of a depthwise convolution to our `(K, C)`."""
    return weight_C1K[:, 0].T


def copy_mixer(target: Any, source: Any, zero_centred: bool) -> None:
    if isinstance(target, Attention):
        copy_attention(target, source, zero_centred)
    elif isinstance(target, Mamba):
        copy_mamba(target, source)
    elif isinstance(target, LinearAttention):
        copy_mamba2(target, source)
    elif isinstance(target, RGLRU):
        copy_rg_lru(target, source)
    else:
        assert isinstance(target, DeltaRule)
        copy_delta_rule(target, source)


def copy_attention(target: Any, source: Any, zero_centred: bool) -> None:
    if target.gate is not None:  # the peer's query matrix holds each head's gate behind its query
        q, gate = source.q_proj.weight.view(target.heads, 2, target.head_dim, -1).unbind(1)
        matrix(target.gate, gate.flatten(0, 1))
        matrix(target.qkv, q.flatten(0, 1), source.k_proj.weight, source.v_proj.weight)
    else:
        matrix(target.qkv, source.q_proj, source.k_proj, source.v_proj)
    matrix(target.out, source.o_proj)
    if target.q_norm is not None:
        copy_norm(target.q_norm, source.q_norm, zero_centred)
        copy_norm(target.k_norm, source.k_norm, zero_centred)


def copy_mamba(target: Any, source: Any) -> None:
    for ours, theirs in (
        (target.inner, source.in_proj),
        (target.select, source.x_proj),
        (target.out, source.out_proj),
    ):
        matrix(ours, theirs)
    target.step.weight.copy_(source.dt_proj.weight)
    target.step_bias.copy_(source.dt_proj.bias)
    target.conv.weight.copy_(conv_weight_of(source.conv1d.weight))
    target.conv.bias.copy_(source.conv1d.bias)
    target.log_rate.copy_(source.A_log.T)
    target.skip.copy_(source.D)
    for norm, name in zip(target.norms, ("dt", "b", "c"), strict=False):
        theirs = getattr(source, f"{name}_layernorm")
        if isinstance(theirs.weight, nn.Parameter):
            copy_norm(norm, theirs)
        else:
            norm.weight.fill_(1)
            norm.eps = theirs.eps


def copy_mamba2(target: Any, source: Any) -> None:
    E, S = source.intermediate_size, source.ssm_state_size
    z, x, b, c, dt = source.in_proj.weight.split((E, E, S, S, source.num_heads))
    matrix(target.qkv, c, b, x)
    matrix(target.gate, z)
    matrix(target.decay, dt)
    matrix(target.out, source.out_proj)
    order = torch.cat((torch.arange(E + S, E + 2 * S), torch.arange(E, E + S), torch.arange(E)))
    target.conv.weight.copy_(conv_weight_of(source.conv1d.weight)[:, order])
    target.conv.bias.copy_(source.conv1d.bias[order])
    target.decay_bias.copy_(source.dt_bias)
    target.log_rate.copy_(source.A_log)
    target.skip.copy_(source.D)
    copy_norm(target.norm, source.norm)


def copy_lightning(target: Any, source: Any) -> None:
    H, K = source.num_attention_heads, source.head_dim
    matrix(target.qkv, source.qkv_proj.weight.view(H, 3, K, -1).transpose(0, 1).flatten(0, 2))
    matrix(target.gate, source.output_gate)
    matrix(target.out, source.out_proj)
    copy_norm(target.norm, source.norm)


def copy_rg_lru(target: Any, source: Any) -> None:
    matrix(target.inner, source.linear_y, source.linear_x)
    matrix(target.out, source.linear_out)
    target.conv.weight.copy_(conv_weight_of(source.conv_1d.weight))
    target.conv.bias.copy_(source.conv_1d.bias)
    unit = source.rg_lru
    gates = (unit.recurrent_gate_weight, unit.input_gate_weight)
    target.gate_weight.copy_(torch.cat(gates, dim=-1))
    target.gate_bias.copy_(torch.cat((unit.recurrent_gate_bias, unit.input_gate_bias), dim=-1))
    target.decay.copy_(unit.recurrent_param)


def copy_delta_rule(target: Any, source: Any) -> None:
    H, K, V = target.heads, target.key_dim, target.value_dim
    if hasattr(source, "in_proj_qkvz"):  # Qwen3-Next keeps what belongs to a key head together
        by_head = source.in_proj_qkvz.weight.view(H, 2 * K + 2 * V, -1).split((K, K, V, V), dim=1)
        q, k, v, z = (part.flatten(0, 1) for part in by_head)
        beta, a = source.in_proj_ba.weight.view(H, 2, -1).unbind(1)
        norm, out = source.norm, source.out_proj
    else:
        q, k, v = (getattr(source, f"{name}_proj").weight for name in "qkv")
        z, beta, a = source.g_proj.weight, source.b_proj.weight, source.a_proj.weight
        norm, out = source.o_norm, source.o_proj
    matrix(target.qkv, q, k, v)
    matrix(target.gate, z)
    matrix(target.rates, beta, a)
    matrix(target.out, out)
    target.conv.weight.copy_(conv_weight_of(source.conv1d.weight))
    target.log_decay.copy_(source.A_log)
    target.rate_bias.copy_(source.dt_bias)
    copy_norm(target.norm, norm)
