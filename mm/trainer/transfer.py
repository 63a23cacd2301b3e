"""Batches on their way to a device: one asynchronous copy each, while the step before runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.batch import Batch

ALIGNED = 256  # bytes, as the allocator of a device aligns: kernels read 16 at once


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch whose tensors are parts of one buffer that is being copied to a device."""

    batch: Batch  # there, once the copy is done
    buffer: Tensor
    done: torch.cuda.Event | None

    def arrive(self) -> Batch:
        """The batch on its device, for what the current stream does from now on."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_event(self.done)
            self.buffer.record_stream(stream)  # the allocator gives its memory to no other before
        return self.batch


class Sender:
    """Sends batches to a device, from the thread that makes them.

    A copy from memory that the system may move makes the host wait, and each costs a launch: the
    tensors of a batch are packed into one buffer of pinned memory. On a GPU it has a stream of its
    own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Batch) -> Sent:
        """Begin to copy every tensor of a batch on the host."""
        found: dict[int, tuple[Tensor, int]] = {}
        size = 0

        def place(t: Tensor) -> Tensor:
            nonlocal size
            if id(t) not in found:
                found[id(t)] = t, size
                size += math.ceil(t.nbytes / ALIGNED) * ALIGNED
            return t

        batch.map_tensors(place)
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        for t, at in found.values():
            _part(packed, at, t).copy_(t)
        if self.stream is None:
            there, done = packed.to(self.device, copy=True), None
        else:
            with torch.cuda.stream(self.stream):
                there = packed.to(self.device, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self.stream)
        return Sent(batch.map_tensors(lambda t: _part(there, found[id(t)][1], t)), there, done)


def _part(buffer: Tensor, at: int, like: Tensor) -> Tensor:
    """The bytes from ``at`` on as a tensor of the shape and dtype of ``like``."""
    return buffer[at : at + like.nbytes].view(like.dtype).view(like.shape)
