"""Whether something holds of a place, such as that its token was replaced. P places, D model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Head, HeadOut
from mm.registry import HEADS
from mm.state import State


class Bernoulli(NamedTuple):
    """Parameter-free distribution over 0 and 1. ``logit`` `(P,)` float32, of 1."""

    logit: Tensor

    @property
    def logits(self) -> Tensor:
        """`(P, 2)` of 0 and 1."""
        return torch.stack((torch.zeros_like(self.logit), self.logit), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """`(P,)` log-probability of 0 or 1 `(P,)`."""
        return -F.binary_cross_entropy_with_logits(
            self.logit, value.to(self.logit.dtype), reduction="none"
        )

    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """`(P,)` int64; temperature 0 takes the likelier one."""
        if temperature == 0:
            return (self.logit > 0).long()
        return torch.bernoulli((self.logit / temperature).sigmoid(), generator=generator).long()


class Binary(Head):
    """``sigmoid(w . h + b)`` of each place, which costs the binary cross-entropy of a target.

    Source: Clark et al. 2020, ELECTRA (arXiv:2003.10555), section 2, the discriminator's output;
    the bias is its code's.
    """

    shard = "local"
    predicts_ids = False

    def __init__(self, d_model: int, config: BinaryConfig):
        super().__init__()
        self.reads = config.reads
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.bias = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        """``target`` `(P,)` of 0 and 1, or None for the distribution."""
        h = h_BTD.flatten(0, 1).index_select(0, places_P.long())
        logit = F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))[:, 0]
        told = Bernoulli(logit.to(torch.promote_types(logit.dtype, torch.float32)))
        return HeadOut(None, told) if target is None else HeadOut(-told.log_prob(target), None)


@HEADS.register("binary")
class BinaryConfig(Config):
    """One logit a place. The objective `replaced_token` trains it."""

    kind: Literal["binary"] = "binary"
    reads: Annotated[str, Field(description="hidden states that it reads")] = "hidden"

    def build(self, d_model: int, n_ids: int) -> Binary:
        return Binary(d_model, self)
