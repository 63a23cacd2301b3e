"""Bytes that live, seen operator by operator: on real tensors they measure, on fake ones predict.

One counter for both, so that what is compared was counted alike.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of c10d -> the name of the collective
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
}


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def objects() -> list[Any]:
    """Every object of the garbage collector, also those that `gc.freeze` took out of its sight."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    found = gc.get_objects()
    if frozen:
        gc.freeze()
    return found


class LiveBytes:
    """Bytes of all storages that were seen and still live, with their peak.

    Attributes:
        now, peak: bytes.
        at_peak: bytes by label when ``now`` was last at its peak.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.by: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._seen: dict[int, tuple[int, str]] = {}

    def add(self, x: Tensor, label: str) -> bool:
        """Count the storage of ``x`` under ``label``. Returns False where it was counted before."""
        if x.device.type == "meta":  # shapes alone (a fake tensor tells the device it stands for)
            return False
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return False
        self._seen[key] = (size, label)
        weakref.finalize(storage, self._drop, key)
        self.now += size
        self.by[label] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.by.copy()
        return True

    def ignore(self, x: Tensor) -> None:
        """Never count the storage of ``x``, which lives on."""
        self._seen.setdefault(x.untyped_storage()._cdata, (0, "ignored"))

    def relabel(self, x: Tensor, label: str) -> None:
        """Count the storage of ``x`` under another label from now on."""
        key = x.untyped_storage()._cdata
        if key in self._seen:
            size, old = self._seen[key]
            self._seen[key] = (size, label)
            self.by[old] -= size
            self.by[label] += size

    def add_all(self, label: str = "before") -> None:
        """Count every tensor that Python knows, such as weights and states of an optimizer."""
        for found in objects():
            if issubclass(type(found), Tensor):
                self.add(found, label)

    def restart_peak(self) -> None:
        """Let the peak begin again from what lives now."""
        self.peak, self.at_peak = self.now, self.by.copy()

    def _drop(self, key: int) -> None:
        size, label = self._seen.pop(key)
        self.now -= size
        self.by[label] -= size


def collective_of(func: Any, args: Sequence[Any]) -> tuple[str, int] | None:
    """Name and bytes of a collective; None of any other operator.

    Bytes are those of the whole message: what is summed, what is gathered, what is scattered.
    """
    namespace, _, rest = func.name().partition("::")
    name = rest.partition(".")[0]
    if namespace != "c10d" or name not in COLLECTIVES:
        return None
    kind = COLLECTIVES[name]
    # outputs come first, inputs second; a whole message is on the side that is not cut
    side = args[1] if kind in ("reduce_scatter", "all_to_all") else args[0]
    return kind, sum(x.numel() * x.element_size() for x in tensors_in(side))


class Measure(TorchDispatchMode):
    """Live bytes and collectives of what runs in the block, on real tensors.

    Attributes:
        live: see `LiveBytes`; begins with all tensors that are there.
        collectives: name -> bytes of their whole messages.
        calls: name -> number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveBytes()
        self.collectives: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Measure:
        gc.collect()
        self.live.add_all()
        self.live.restart_peak()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (found := collective_of(func, args)) is not None:
            self.collectives[found[0]] += found[1]
            self.calls[found[0]] += 1
        made = func(*args, **(kwargs or {}))
        for x in tensors_in(made):
            self.live.add(x, func.name())
        return made


def trainable(modules: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """Trainable parameters of networks, once each."""
    seen: set[torch.nn.Parameter] = set()
    for module in modules:
        for p in module.parameters():
            if p.requires_grad and p not in seen:
                seen.add(p)
                yield p
