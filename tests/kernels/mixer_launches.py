"""Triton launches of a training step of whole models, found on fake CUDA tensors.

A model's step runs in bf16 autocast without a GPU; each call of a Triton op, forward or backward,
is noted and made again on empty tensors of the CPU, where its launches are recorded.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from laws import ROOT
from test_no_silent_host_models import QUICKSTART, with_backbone, words_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_oracle import Launch, recorded

from mm.plan.fake_cuda import fake_cuda
from mm.plan.fake_step import build_stage, train_step
from mm.plan.inputs import documents
from mm.plan.launches import one_of_each
from mm.registry import BACKBONES
from mm.run import Run

ROWS, LENGTH, DOCUMENT = 2, 1024, 512  # enough pairs that none is left to a mask


class Empty(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def make(self) -> Tensor:
        """The tensor on the CPU, in a storage of its own."""
        span = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        storage = torch.empty(self.offset + max(span, 0), dtype=self.dtype)
        return storage.as_strided(self.shape, self.stride, self.offset)


def _without_values(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Empty(tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype)
    return tuple(map(_without_values, x)) if isinstance(x, (list, tuple)) else x


def _with_values(x: Any) -> Any:
    if isinstance(x, Empty):
        return x.make()
    return list(map(_with_values, x)) if isinstance(x, tuple) else x


class Calls(TorchDispatchMode):
    """Notes each distinct call of a Triton op: the op and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mm" and "triton" in func.name():
            assert not kwargs, func
            self.found[func, _without_values(tuple(args))] = None
        return func(*args, **(kwargs or {}))


def calls_of(backbone: dict[str, Any], d_model: int, **model: Any) -> list[Any]:
    """Distinct calls in a step of the quickstart's model with another backbone and width."""
    run = with_backbone(Run.load(ROOT / QUICKSTART), one_of_each(BACKBONES.parse(backbone)))
    model = {"d_model": d_model, **model}
    run = run.model_copy(update={"model": run.model.model_copy(update=model)})
    vocabulary = words_of(run)
    batch = documents(ROWS, LENGTH, DOCUMENT, vocabulary, getattr(run.model, "heads", {}))
    given = lambda f: f._replace(extra={"prefix": (f.position[..., 0] < 4).int()})
    batch = dataclasses.replace(batch, layout=batch.layout.map_fields(given))
    with fake_cuda() as reads, Calls() as calls:
        train_step(reads, build_stage(run, 0, vocabulary), 0, [batch], vocabulary)
    return list(calls.found)


def launches_of(calls: list[Any], card: int) -> list[Launch]:
    """Launches of the calls on a card."""
    with recorded(card) as launches:
        for op, args in calls:
            op(*map(_with_values, args))
    return launches
