"""Sizes of the networks of a stage, from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.plan.trace import parameters_by_part

PERSISTENT = 100_000  # elements up to which ZeRO stage 3 cuts no parameter (DeepSpeed's default)


@dataclass(frozen=True)
class Networks:
    """Sizes of the networks of a stage.

    Attributes:
        elements: of trained parameters, and of those that ZeRO stage 3 does not cut.
        weight_bytes: an element.
        buffer_bytes: whole in every process.
        still_bytes: of parameters that do not train in networks that do.
        other_bytes: of networks that do not train, and of the largest parameter of these.
        state_bytes: of the optimizer, an element.
    """

    elements: int
    persistent: int
    tensors: int
    largest: int
    weight_bytes: int
    buffer_bytes: int
    still_bytes: int
    other_bytes: tuple[int, int]
    state_bytes: float
    by_part: dict[str, int]

    @classmethod
    def of(
        cls, optimizer: Any, trained: dict[str, nn.Module], frozen: dict[str, nn.Module]
    ) -> Networks:
        sizes = [p.numel() for m in trained.values() for p in m.parameters() if p.requires_grad]
        size_of = lambda x: x.numel() * x.element_size()
        others = [size_of(p) for m in frozen.values() for p in m.parameters()]
        buffers = [b for m in (*trained.values(), *frozen.values()) for b in m.buffers()]
        still = [p for m in trained.values() for p in m.parameters() if not p.requires_grad]
        first = next(p for m in trained.values() for p in m.parameters() if p.requires_grad)
        return cls(
            sum(sizes),
            sum(n for n in sizes if n <= PERSISTENT),
            len(sizes),
            max(sizes),
            first.element_size(),
            sum(map(size_of, buffers)),
            sum(map(size_of, still)),
            (sum(others), max(others, default=0)),
            state_bytes(optimizer),
            dict(parameters_by_part(trained)),
        )


def state_bytes(optimizer: Any) -> float:
    """Bytes of an optimizer's states, an element; asks the optimizer itself for one small step."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(64, 64))
    made = optimizer.build(module)
    module.weight.grad = torch.zeros(64, 64)
    made.step()
    held = [v for state in made.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in held if v.numel() > 1) / 64**2
