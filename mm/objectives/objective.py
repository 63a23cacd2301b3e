"""Objective: what is learned.

Three places, three times: transform (data workers), corrupt (device), terms (the loop).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm.batch import Batch
from mm.model.layer import ModelOut

NONE: Mapping[str, Any] = {}


class Network(NamedTuple):
    """A further network of an objective: "train" has its own engine and optimizer, "ema" follows
    ``of``, "frozen" has none.
    """

    config: Any  # a network Config; None: that of ``of``
    mode: Literal["train", "frozen", "ema"] = "train"
    of: str | None = None  # a trained network
    decay: float = 0.999  # of the average, after each applied step of ``of``


class Term(NamedTuple):
    """One backward."""

    losses: Mapping[
        str, Tensor
    ]  # SUMS; the trainer divides by the global counts of the same names and weights them
    network: str = "model"
    step: bool = False  # then step this network's optimizer


class Env(Protocol):
    """What the trainer lends an objective."""

    step: int  # optimizer steps done so far, equal on all ranks
    device: torch.device
    rng: torch.Generator

    def frozen(self, name: str) -> AbstractContextManager[nn.Module]:
        """The RAW module of another network, ``requires_grad`` off inside the block: gradients flow
        through, not into it.
        """
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors along dim 0, with gradient."""
        ...


class Objective(ABC):
    """Plug point. The trainer knows no objective by name."""

    networks: Mapping[str, Network] = NONE  # "model" is implied
    transform: Any = None  # config of a Transform, run in the data workers
    weights: Mapping[str, float] = NONE  # of each named loss; default 1

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """Host values of a step, equal on all ranks (``rng``: numpy Generator of (seed, step))."""
        return {}

    def corrupt(self, b: Batch, rng: Any, scheduled: Mapping[str, float]) -> Batch:
        """Shape-preserving change on the device: masks, noise, times."""
        return b

    @abstractmethod
    def counts(self, b: Batch) -> dict[str, Tensor]:
        """Denominator of every named loss, from the batch alone: reduced over micro-batches and
        ranks before any backward.
        """

    def scales(self, n: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        """Factor of each loss's global mean in the total, from the global counts ``n``.

        Default: ``weights``.
        """
        return {name: self.weights.get(name, 1.0) for name in n}

    @abstractmethod
    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[Term]:
        """All passes of one step over all micro-batches.

        Same yields in the same order on all ranks.
        """
