"""Plug-ins that are wrong with several processes alone, by `imports:` of a run of the toys."""

from __future__ import annotations

from typing import Any, Literal

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


@STREAMS.register("same_rows")
class SameRowsConfig(ToyStreamConfig):
    """Every process reads the rows of the first one."""

    kind: Literal["same_rows"] = "same_rows"  # type: ignore[assignment]

    def build(self, *, vocabulary: Vocabulary, seed: int, rank: int, world: int) -> Any:
        return ToyStream(self, vocabulary, seed, 0, world)
