"""The order in which gradients are ready, which ZeRO takes to be that of every process."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mm.errors import UserError


class GradientOrder:
    """Looks at a network's first step: one order in which its gradients are ready everywhere.

    ZeRO from stage 2 on joins gradients in one buffer as they come and sums the buffers of all
    processes: two that change places in one of them are added to each other, without a word.
    Autograd runs backward first what ran last, so a layer that takes its weights in the order of a
    set of names is enough: each process hashes strings in its own way.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]):
        self._ready: list[str] = []
        note = lambda name: lambda _: self._ready.append(name)
        self._handles = [p.register_post_accumulate_grad_hook(note(name)) for name, p in parameters]

    def check(self, device: torch.device) -> None:
        """Compare with rank 0 and look no more. Call on all ranks.

        Raises:
            UserError: naming the first parameter; on all of them.
        """
        for handle in self._handles:
            handle.remove()
        told: list[Any] = [self._ready]
        dist.broadcast_object_list(told, 0, device=device)
        pairs = enumerate(zip_longest(self._ready, told[0]))
        longest = torch.iinfo(torch.int64).max
        place = next((i for i, (mine, theirs) in pairs if mine != theirs), longest)
        first = torch.tensor(place, device=device)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if (k := int(first)) < longest:
            name = told[0][k] if k < len(told[0]) else "the end"
            raise UserError(
                f"gradients are not ready in one order in all processes, from '{name}' on: ZeRO "
                "from stage 2 on would sum those of different parameters. A layer that takes its "
                "weights in the order of a set does that: sort it; or set engine.zero_stage=1"
            )
