"""Gradients averaged over processes at ZeRO stage 0, in buckets, while the backward still runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Reducer:
    """Sums each bucket as soon as its gradients are there (Li et al. 2020, arXiv:2006.15704).

    Buckets hold the parameters from the last to the first, as a backward reaches them, and go one
    after the other in this order in every process, whatever order gradients are ready in; so the
    sums are the same bits whether they overlap with the backward or not. A parameter that got no
    gradient gives zeros. Messages have a process group of their own: a collective inside the
    backward may come before or after one.

    Args:
        parameters: that train, in the same order in all processes.
        bucket_size: elements of one message, at most (a larger parameter has one of its own).
        dtype: of gradients on the way; None: their own.
        overlap: sum in the backward that `arm` announces; else all in `finish`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        bucket_size: int,
        dtype: torch.dtype | None = None,
        overlap: bool = False,
    ):
        self._dtype, self._world = dtype, dist.get_world_size()
        self._group: Any = dist.new_group() if overlap and self._world > 1 else None
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket_size + 1
        for p in reversed(parameters):
            size += p.numel()
            if size > bucket_size or self._buckets[-1][0].dtype != p.dtype:
                self._buckets.append([])
                size = p.numel()
            self._buckets[-1].append(p)
        # Gradients that each bucket waits for; None: the backward is not the last one.
        self._waits: list[int] | None = None
        self._sent: list[tuple[Any, Tensor, list[nn.Parameter]]] = []
        if self._group is not None:
            for i, bucket in enumerate(self._buckets):
                for p in bucket:
                    p.register_post_accumulate_grad_hook(lambda _, i=i: self._ready(i))

    def arm(self) -> None:
        """The next backward is the last of the step."""
        if self._group is not None:
            self._waits = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Average what is left, and wait for all. Call on all ranks, after the last backward."""
        self._waits = None
        while len(self._sent) < len(self._buckets):
            self._send()
        for work, flat, bucket in self._sent:
            if work is not None:
                work.wait()
                flat.mul_(1 / self._world)
            if work is None or flat.dtype == bucket[0].dtype:
                continue  # the gradients are views of what was sent
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                assert p.grad is not None
                p.grad.copy_(mean.view_as(p))
        self._sent = []

    def _ready(self, i: int) -> None:
        if self._waits is None:
            return
        self._waits[i] -= 1
        while (k := len(self._sent)) < len(self._buckets) and self._waits[k] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self._world == 1:
            self._sent.append((None, bucket[0].new_empty(0), []))
            return
        dtype = self._dtype or bucket[0].dtype
        flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None]).to(dtype)
        if dtype == bucket[0].dtype:  # the gradients are views of what is sent from here on
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._sent.append((work, flat, bucket))
