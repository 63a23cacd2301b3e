"""Mamba-2. H heads, G groups that share keys and queries (B and C), S states, E inner width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.families.state_space import StateSpace
from mm.interchange.family import Settings
from mm.interchange.parts import Chain, Entry, Folded, Part, Pieces, Taps
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("mamba2")
class Mamba2Lm(StateSpace):
    """Dao & Gu 2024 (arXiv:2405.21060)."""

    kind: Literal["mamba2"] = "mamba2"
    architecture: ClassVar[str] = "Mamba2ForCausalLM"
    mixers: ClassVar[tuple[str, ...]] = ("linear_attention",)
    tied: ClassVar[bool] = False
    into: ClassVar[tuple[str, ...]] = ("decay", "gate", "qkv")

    def mixer(self, c: Settings) -> dict[str, Any]:
        for way in ("chunk_size", "time_step_rank"):
            c.get(way)
        unbounded = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}])
        if c.get("time_step_limit", unbounded[0]) not in unbounded:
            raise c.refuse("time_step_limit", "bounds the steps, which has no equal here")
        H, G, K = c.whole("num_heads", 128), c.whole("n_groups", 8), c.whole("head_dim", 64)
        D, expand = c.whole("hidden_size"), c.get("expand", 2)
        if H * K != expand * D:
            raise c.refuse("head_dim", f"times num_heads is not {expand} * hidden_size")
        return {
            "kind": "linear_attention",
            "heads": H,
            "key_heads": G,
            "key_dim": c.whole("state_size", 128),
            "expand_value": expand,
            "feature": "silu",
            "value": "silu",
            "normalise": False,
            "decay": "step",
            "conv_size": c.whole("conv_kernel", 4),
            "conv_bias": c.get("use_conv_bias", True),
            "skip": True,
            "norm": "full" if G == 1 else "key_head",
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "gate": "silu",
            "gate_first": True,
        }

    def mixer_config(self, mixer: Any, D: int) -> dict[str, Any]:
        expand = int(mixer.expand_value)
        return {
            "num_heads": mixer.heads,
            "head_dim": expand * D // mixer.heads,
            "n_groups": mixer.key_heads or mixer.heads,
            "state_size": mixer.key_dim,
            "expand": expand,
        }

    def mixer_entries(self, lm: LmConfig, mixer: Any, ours: str, theirs: str) -> Iterator[Entry]:
        G = mixer.key_heads
        sizes = {
            "gate": int(mixer.expand_value) * lm.d_model,
            "x": int(mixer.expand_value) * lm.d_model,
            "B": G * mixer.key_dim,
            "C": G * mixer.key_dim,
            "step": mixer.heads,
        }
        names = lambda text: [(name, 0) for name in text.split()]
        qkv = names("C B x")
        whole = Pieces(sizes, [names("gate x B C step")], [qkv, names("gate"), names("step")])
        own = [f"{ours}.{name}" for name in ("qkv", "gate", "decay")]
        for kind in ("weight", "bias") if lm.linear.bias else ("weight",):
            yield Entry(tuple(f"{o}.{kind}" for o in own), (f"{theirs}.in_proj.{kind}",), whole)
            yield Entry(f"{ours}.out.{kind}", (f"{theirs}.out_proj.{kind}",))
        order = Pieces(sizes, [names("x B C")], [qkv])
        yield Entry(f"{ours}.conv.weight", (f"{theirs}.conv1d.weight",), Chain(order, Taps()))
        if mixer.conv_bias:
            yield Entry(f"{ours}.conv.bias", (f"{theirs}.conv1d.bias",), order)
        yield Entry(f"{ours}.decay_bias", (f"{theirs}.dt_bias",))
        yield Entry(f"{ours}.log_rate", (f"{theirs}.A_log",))
        yield Entry(f"{ours}.skip", (f"{theirs}.D",))
        norm = Part() if G == 1 else Folded(G)
        yield Entry(f"{ours}.norm.weight", (f"{theirs}.norm.weight",), norm)
