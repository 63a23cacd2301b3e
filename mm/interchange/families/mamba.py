"""Mamba. E inner width, S states of a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.interchange.families.state_space import StateSpace
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Taps, Transposed
from mm.model.model import LmConfig
from mm.registry import FAMILIES


@FAMILIES.register("mamba")
class MambaLm(StateSpace):
    """Gu & Dao 2023 (arXiv:2312.00752)."""

    kind: Literal["mamba"] = "mamba"
    architecture: ClassVar[str] = "MambaForCausalLM"
    mixers: ClassVar[tuple[str, ...]] = ("mamba",)
    tied: ClassVar[bool] = True
    into: ClassVar[tuple[str, ...]] = ("inner",)

    def mixer(self, c: Settings) -> dict[str, Any]:
        for way in ("use_mambapy", "use_associative_scan", "time_step_init_scheme"):
            c.get(way)
        D, rank = c.whole("hidden_size"), c.get("time_step_rank")
        width = c.get("intermediate_size", c.get("expand", 2) * D)
        if width % D:
            raise c.refuse("intermediate_size", f"is no multiple of hidden_size {D}")
        return {
            "kind": "mamba",
            "expand": width // D,
            "states": c.whole("state_size", 16),
            "conv_size": c.whole("conv_kernel", 4),
            "conv_bias": c.get("use_conv_bias", True),
            "rank": -(-D // 16) if rank in (None, "auto") else c.whole("time_step_rank"),
        }

    def mixer_config(self, mixer: Any, D: int) -> dict[str, Any]:
        return {
            "expand": mixer.expand,
            "intermediate_size": mixer.expand * D,
            "state_size": mixer.states,
            "time_step_rank": mixer.rank or -(-D // 16),
        }

    def mixer_entries(self, lm: LmConfig, mixer: Any, ours: str, theirs: str) -> Iterator[Entry]:
        for own, name in (("inner", "in_proj"), ("out", "out_proj")):
            yield Entry(f"{ours}.{own}.weight", (f"{theirs}.{name}.weight",))
            if lm.linear.bias:
                yield Entry(f"{ours}.{own}.bias", (f"{theirs}.{name}.bias",))
        yield Entry(f"{ours}.conv.weight", (f"{theirs}.conv1d.weight",), Taps())
        if mixer.conv_bias:
            yield Entry(f"{ours}.conv.bias", (f"{theirs}.conv1d.bias",))
        yield Entry(f"{ours}.select.weight", (f"{theirs}.x_proj.weight",))
        yield Entry(f"{ours}.step.weight", (f"{theirs}.dt_proj.weight",))
        yield Entry(f"{ours}.step_bias", (f"{theirs}.dt_proj.bias",))
        yield Entry(f"{ours}.log_rate", (f"{theirs}.A_log",), Transposed())
        yield Entry(f"{ours}.skip", (f"{theirs}.D",))
