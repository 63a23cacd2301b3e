"""Gradients: whole gradients of parameters in the next update, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mm.trainer.engine.deepspeed import Engine


class Gradients:
    """Hands the gradients of some parameters to a function, as the optimizer gets them.

    That is averaged over ranks and clipped (see `unclip`), in float32, whole on every rank: a
    collective for each parameter from ZeRO stage 1 on. An update that is left out hands over none.

    Args:
        names: of the parameters, as in `Engine.trainable`.
        take: called with a name and its gradient, on all ranks in one order.
    """

    def __init__(self, engine: Engine, names: Iterable[str], take: Callable[[str, Tensor], None]):
        self._engine, self._names, self._take = engine, set(names), take
        self._handle = engine.base.register_step_pre_hook(self._read)

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()

    @torch.no_grad()
    def _read(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed steps one group after the other at some stages: each is looked at in its turn.
        for group in optimizer.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                for span in self._engine.shards.spans.get(x, ()):
                    if span.name in self._names:
                        self._take(span.name, self._engine.shards.full(x, x.grad, span).float())


def unclip(norm: float, clip: float) -> float:
    """What a clipped gradient times gives it as it was; ``norm`` before clipping to ``clip``."""
    return (norm + 1e-6) / clip if clip and norm > clip else 1.0
