"""Softmax over the whole vocabulary. P places, D model, N ids, B rows, T tokens, S streams."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.cross_entropy import linear_cross_entropy
from mm.model.context import Ctx
from mm.model.layer import Head, HeadOut
from mm.registry import HEADS
from mm.state import State


class Categorical(NamedTuple):
    """Parameter-free distribution over ids. ``logits`` `(P, N)` float32.

    A tuple, as all that layers return: ZeRO stage 3 finds the tensors in it, and gathers the
    weights for their backward.
    """

    logits: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """`(P,)` log-probability of ids `(P,)`."""
        return self.logits.log_softmax(-1).gather(-1, value.long()[..., None])[..., 0]

    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """`(P,)` int64 ids; temperature 0 takes the most likely."""
        if temperature == 0:
            return self.logits.argmax(-1)
        return torch.multinomial((self.logits / temperature).softmax(-1), 1, generator=generator)[
            ..., 0
        ]


class Softmax(Head):
    """Linear layer and softmax.

    The loss never holds all logits at once; the distribution is built only when asked for.
    """

    shard = "local"

    def __init__(self, d_model: int, n_ids: int, config: SoftmaxConfig):
        super().__init__()
        self.z_loss, self.softcap = config.z_loss, config.softcap
        self.reads, self.stream, self.tied = config.reads, config.stream, config.tied
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))

    def init_weights(self) -> None:
        if not self.tied:
            nn.init.normal_(self.weight, std=0.25 * self.weight.shape[1] ** -0.5)

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        """``target`` `(P,)` or `(P, S)` int ids, or None for the distribution."""
        h = self.narrow(h_BTD.flatten(0, 1).index_select(0, places_P.long()))
        if target is None:
            logits = nn.functional.linear(h, self.weight.to(h.dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.softcap is not None:
                logits = self.softcap * (logits / self.softcap).tanh()
            return HeadOut(None, Categorical(logits))
        ids = target[:, self.stream] if target.dim() == 2 else target
        # The z-loss is no likelihood: what is judged does without it.
        z_loss = self.z_loss if self.training else 0.0
        nll = linear_cross_entropy(h, self.weight, ids, z_loss=z_loss, softcap=self.softcap)
        return HeadOut(nll, None)


@HEADS.register("softmax")
class SoftmaxConfig(Config):
    """Softmax over the vocabulary.

    ``reads`` names the hidden states it reads, ``stream`` the targets.
    """

    kind: Literal["softmax"] = "softmax"
    renamed: ClassVar[dict[str, str]] = {"tap": "reads"}
    reads: str = "hidden"
    stream: int = 0
    tied: bool = False
    z_loss: float = Field(
        default=0.0, ge=0, description="times log(Z) squared, added to the loss in training"
    )
    softcap: Annotated[float, Field(gt=0, description="bound of the logits")] | None = None

    def build(self, d_model: int, n_ids: int) -> Softmax:
        return Softmax(d_model, n_ids, self)
