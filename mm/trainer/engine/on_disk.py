"""What DeepSpeed keeps on a disk between its uses, brought into memory to be read or set.

ZeRO-Infinity (arXiv:2104.07857): masters, optimizer states and slices of weights are empty tensors
in between. What is small stays in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def states_in_memory(optimizer: Any, x: Tensor, changed: bool = False) -> Iterator[bool]:
    """One of the optimizer's tensors with its states; ``changed``: they go back to the disk.

    Args:
        optimizer: DeepSpeed's, of a network.
    Yields:
        Whether they are buffers that are taken away again: a copy of them must be kept, not they.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None or swapper._get_param_swap_info(x) is None:
        yield False
        return
    swapper.swap_in_optimizer_state(parameter=x)
    try:
        yield True
    finally:
        if changed:
            swapper.swap_out_optimizer_state(parameter=x)
        else:
            swapper.writeback_optimizer_state_and_gradients(x, False, False)


@contextlib.contextmanager
def slice_in_memory(p: nn.Parameter, changed: bool = False) -> Iterator[bool]:
    """This process's slice of a parameter that ZeRO stage 3 has cut; as `states_in_memory`."""
    cut: Any = p
    swapper = getattr(cut, "nvme_swapper", None)
    if swapper is None or cut.ds_tensor.status.name != "NOT_AVAILABLE":
        yield False
        return
    swapper.swap_in([p], async_op=False)
    try:
        yield True
    finally:
        if changed:
            swapper.swap_out_and_release([p])
        else:
            swapper.remove_partition_and_release_buffers([p])
