"""Plug-ins that are wrong with several processes alone, by `imports:` of a run of the toys."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from trainer_toys import ToyConfig, ToyLM, ToyStream, ToyStreamConfig

from mm.launch import environment
from mm.registry import NETWORKS, STREAMS
from mm.vocabulary import Vocabulary


@NETWORKS.register("summed_lm")
class SummedConfig(ToyConfig):
    """The gradient of one weight is summed over the processes, where the mean is wanted."""

    kind: Literal["summed_lm"] = "summed_lm"  # type: ignore[assignment]

    def build(self, vocabulary: Vocabulary | None = None) -> ToyLM:
        made = super().build(vocabulary)
        world = environment.ranks().world
        made.down.weight.register_hook(lambda grad: grad * world)
        return made


@NETWORKS.register("twice_lm")
class TwiceConfig(ToyConfig):
    """Nothing is wrong with it: its middle runs three times in a forward, as in a looped model."""

    kind: Literal["twice_lm"] = "twice_lm"  # type: ignore[assignment]

    def build(self, vocabulary: Vocabulary | None = None) -> ToyLM:
        made = super().build(vocabulary)
        made.norm = Again(made.norm, made.up, made.down)  # type: ignore[assignment]
        return made


class Again(nn.Module):
    """Two passes through modules that the model itself calls once more."""

    def __init__(self, norm: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.norm, self.up, self.down = norm, up, down

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.norm(x)


@STREAMS.register("same_rows")
class SameRowsConfig(ToyStreamConfig):
    """Every process reads the rows of the first one."""

    kind: Literal["same_rows"] = "same_rows"  # type: ignore[assignment]

    def build(self, *, vocabulary: Vocabulary, seed: int, rank: int, world: int) -> Any:
        return ToyStream(self, vocabulary, seed, 0, world)
