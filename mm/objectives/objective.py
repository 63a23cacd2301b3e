"""Objective: what is learned.

Three places, three times: transform (data workers), corrupt (device), terms (the loop).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch, Sum
from mm.errors import UserError
from mm.init_from import InitFrom
from mm.model.layer import ModelOut

NONE: Mapping[str, Any] = {}
AFTER_WARM_UP = 2**40  # a step that no warm-up reaches


class Network(NamedTuple):
    """A further network of an objective.

    "train" has its own engine and optimizer, "ema" follows ``of``, "frozen" stays as it is: as
    ``init_from`` has it, or as ``of`` is when the network is first used.
    """

    config: Any = None  # a network Config; None: that of ``init_from``, else of ``of``
    mode: Literal["train", "frozen", "ema"] = "train"
    of: str | None = None  # a trained network
    decay: float = 0.999  # of the average, after each applied step of ``of``
    init_from: InitFrom | None = None  # trained weights that it begins with


class LossTerm(NamedTuple):
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
        """The RAW module of another network, ``requires_grad`` off inside the block.

        Gradients flow through it, not into it.
        """
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors along dim 0, with gradient."""
        ...


AuxWeights = Annotated[
    dict[str, float],
    Field(description="factor of losses that modules report, such as commitment; default 0"),
]


def aux_named(aux: Mapping[str, Sum], name: str) -> list[Sum]:
    """Losses of every module that reports one as ``name``: the last part of the qualified key."""
    return [s for k, s in aux.items() if k.rpartition(".")[2] == name and s.total.dim() == 0]


def aux_total(aux: Mapping[str, Sum], name: str) -> Tensor | None:
    """Total of `aux_named` over the modules; None when there is none."""
    totals = [each.total for each in aux_named(aux, name)]
    return torch.stack(totals).sum() if len(totals) > 1 else totals[0] if totals else None


class Objective(ABC):
    """Plug point. The trainer knows no objective by name."""

    networks: Mapping[str, Network] = NONE  # "model" is implied
    reads_codebooks: ClassVar[bool] = False  # a place may be several targets, one a codebook
    transform: Any = None  # config of a Transform, run in the data workers
    weights: Mapping[str, float] = NONE  # of each named loss; default 1
    aux_weights: Mapping[str, float] = NONE  # of losses that modules report; default 0

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """Host values of a step, equal on all ranks (``rng``: numpy Generator of (seed, step))."""
        return {}

    def scheduled_held_out(self) -> dict[str, float]:
        """Host values of a held-out loss: after every warm-up, so that it compares over steps."""
        return self.scheduled(AFTER_WARM_UP, np.random.default_rng(0))

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of the losses ``n`` that the held-out loss is made of; default: its own ones.

        Losses that modules report (``aux_weights``) say nothing about held-out data.
        """
        return tuple(name for name in n if name not in self.aux_weights)

    def corrupt(self, b: Batch, rng: Any, scheduled: Mapping[str, float]) -> Batch:
        """Shape-preserving change on the device: masks, noise, times."""
        return b

    def check_model(self, model: nn.Module) -> None:  # noqa: B027  most train any
        """Refuse a "model" that this cannot train, such as one whose mask shows what it predicts.

        Raises:
            UserError: says what it needs.
        """

    @abstractmethod
    def counts(self, b: Batch) -> dict[str, Tensor]:
        """Denominator of every named loss, from the batch alone.

        Reduced over micro-batches and ranks before any backward.
        """

    def scales(self, n: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        """Factor of each loss's global mean in the total, from the global counts ``n``.

        Default: ``aux_weights`` and ``weights``.
        """
        return {k: self.aux_weights.get(k, self.weights.get(k, 1.0)) for k in n}

    def aux_counts(self, b: Batch) -> dict[str, Tensor]:
        """Denominators of `aux_losses`, for `counts`: the tokens of documents."""
        if not self.aux_weights:
            return {}
        return dict.fromkeys(self.aux_weights, (b.layout.fields.document > 0).sum())

    def aux_losses(self, out: ModelOut, b: Batch) -> dict[str, Tensor]:
        """Losses of ``aux_weights`` that the modules of ``out`` report, for a term's losses.

        Sums over the tokens of documents of each module's mean, added over the modules. Where the
        module's count grows with the tokens, that is the mean over all micro-batches and ranks.

        Raises:
            UserError: no module reports a loss of that name.
        """
        losses = {}
        for name in self.aux_weights:
            found = aux_named(out.aux, name)
            if not found and torch.is_grad_enabled():
                known = sorted(
                    {k.rpartition(".")[2] for k, s in out.aux.items() if not s.total.dim()}
                )
                raise UserError(
                    f"objective.aux_weights: no module reports '{name}', only "
                    f"{', '.join(known) or 'nothing'}"
                )
            tokens = (b.layout.fields.document > 0).sum()
            each = [s.total * (tokens / s.count.clamp_min(1e-12)) for s in found]
            if each:
                losses[name] = torch.stack(each).sum()
        return losses

    @abstractmethod
    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        """All passes of one step over all micro-batches.

        Same yields in the same order on all ranks.
        """
