"""States of an optimizer before its first step: made as that would make them, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError
from mm.trainer.engine.zero_shards import Shards
from mm.trainer.optimizers.base import ShardOptimizer

Read = Callable[[str, int, int], Tensor]


@torch.no_grad()
def load_states(
    base: torch.optim.Optimizer,
    shards: Shards,
    x: Tensor,
    states: Mapping[str, Any],
    read: Read,
    scalars: Mapping[str, float],
) -> None:
    """Fill ``states`` of ``x``, one of the optimizer's tensors, from a checkpoint.

    Args:
        read: elements ``start : start + n`` of state ``key/parameter name``, on the host.
        scalars: those that are numbers, by key.
    Raises:
        UserError: they are another optimizer's.
    """
    try:
        for key, value in states.items():
            if not isinstance(value, Tensor):
                kind = type(value)
                base.state[x][key] = kind(scalars[key])
            elif value.dim() == 0:
                value.fill_(scalars[key])
            else:
                _load(base, shards, x, key, value, read)
    except KeyError as error:
        raise UserError(
            f"the checkpoint has no optimizer state {error}: it was made with another "
            "optimizer; set stages.N.optimizer back, or use another run name: name=..."
        ) from error


def _load(
    base: torch.optim.Optimizer, shards: Shards, x: Tensor, key: str, value: Tensor, read: Read
) -> None:
    listed = key in getattr(base, "per_parameter", ())
    for i, span in enumerate(shards.spans[x]):
        name = f"{key}/{span.name}"
        if listed:
            value[i] = read(name, 0, value[i].numel()).view(value[i].shape)
        elif value.shape == x.shape:
            shards.put(value, span, lambda start, n, name=name: read(name, start, n))
        else:
            value.copy_(read(name, 0, value.numel()).view(value.shape))


def make_states(
    base: torch.optim.Optimizer,
    shards: Shards,
    in_memory: Callable[[Tensor], AbstractContextManager[Any]],
) -> None:
    """Create the optimizer's states as its first step would.

    ``in_memory``: brings one of its tensors there, and takes it back with its states.
    """
    groups, flats = base.param_groups, list(shards.spans)
    if isinstance(base, ShardOptimizer):
        for flat in flats:
            base.prepare(flat, groups[shards.groups[flat]])
        return
    # a step of rate 0 on zero gradients
    hyper = {k: v for k, v in groups[0].items() if k != "params"} | {"lr": 0.0}
    try:
        for flat in flats:
            with in_memory(flat), torch.no_grad():
                before, buffer = flat.detach().clone(), flat.grad  # DeepSpeed's, on the host
                flat.grad = torch.zeros_like(flat)
                base.param_groups = [{**hyper, "params": [flat]}]
                base.step()
                flat.grad = buffer
                flat.copy_(before)  # -0.0 became 0.0
    finally:
        base.param_groups = groups
