"""Preferences: of two answers to one prompt the better one becomes more likely than it was.

B rows, T tokens, M documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.errors import UserError
from mm.init_from import InitFromField
from mm.model.layer import ModelOut
from mm.objectives.objective import Env, LossTerm, Network, Objective
from mm.registry import OBJECTIVES, TransformField

REFERENCE = "reference"
Form = Literal["sigmoid", "hinge", "ipo"]


@OBJECTIVES.register("dpo")
class DpoConfig(Config):
    """Direct preference optimisation against a frozen reference.

    A document is a prompt and the preferred answer; the same prompt and the rejected answer are its
    second sequence, the part ``rejected`` of the batch.
    """

    kind: Literal["dpo"] = "dpo"
    transform: TransformField | None = None
    reference: InitFromField | None = Field(
        default=None,
        description="a run or saved model of the same vocabulary; default: the model as the stage "
        "begins with it",
    )
    rejected: str = Field(
        default="rejected", description="part of the batch that holds the rejected answers"
    )
    beta: Annotated[float, Field(gt=0, description="larger: nearer to the reference")] = 0.1
    loss: Form = Field(
        default="sigmoid",
        description="of beta times the margin; sigmoid: DPO, hinge: SLiC; ipo: a margin of "
        "1 / (2 beta) by squares",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="sigmoid: share of pairs that are the wrong way"
    )
    nll: float = Field(
        default=0.0, ge=0, description="factor of the preferred answers' own next-token loss"
    )
    head: str = "tokens"

    def build(self, vocabulary: Any = None) -> Dpo:
        """Make the objective. Raises ValueError of settings that do not go together."""
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is of loss: sigmoid, not {self.loss}")
        return Dpo(self)


class Dpo(Objective):
    """A sum over pairs, of log-probabilities of whole documents.

    The prompt's share is the same in both answers of a pair, so that it cancels: nothing need be
    known of where it ends. Besides the loss, the share of pairs with a positive margin
    (``accuracy``) and the mean margin are reported; they have no weight.

    Source: Rafailov et al. 2023, DPO (arXiv:2305.18290), eq. 7; label smoothing: Mitchell 2023;
    hinge: Zhao et al. 2023, SLiC-HF (arXiv:2305.10425); IPO: Azar et al. 2023 (arXiv:2310.12036),
    eq. 17; the preferred answer's own loss: Pang et al. 2024 (arXiv:2404.19733), eq. 1.
    """

    def __init__(self, config: DpoConfig):
        self.config, self.transform = config, config.transform
        self.weights = {"dpo": 1.0, "nll": config.nll, "accuracy": 0.0, "margin": 0.0}
        given = config.reference
        follows = None if given is not None else "model"
        self.networks = {REFERENCE: Network(None, "frozen", of=follows, init_from=given)}

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The loss and the share of pairs that are the right way round."""
        return ("dpo", "accuracy")

    def counts(self, b: Batch) -> dict[str, Tensor]:
        n = self._pairs(b).sum().float()
        out = {"dpo": n, "accuracy": n, "margin": n}
        return out | ({"nll": b.weight.sum()} if self.config.nll else {})

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        c = self.config
        for i, b in enumerate(micros):
            both = (b, self._rejected(b))
            with torch.no_grad():
                before = [self._log_prob(nets[REFERENCE], x)[0] for x in both]
            after = [self._log_prob(nets["model"], x) for x in both]
            better, worse = (now - was for (now, _), was in zip(after, before, strict=True))
            pairs = self._pairs(b).float()
            h = (better - worse) * pairs
            losses = {
                "dpo": (preference(h, c.loss, c.beta, c.label_smoothing) * pairs).sum(),
                "accuracy": ((h.detach() > 0) * pairs).sum(),
                "margin": h.detach().sum(),
            }
            if c.nll:
                losses["nll"] = (after[0][1] * b.weight.flatten()).sum()
            yield LossTerm(losses, step=i == len(micros) - 1)

    def _rejected(self, b: Batch) -> Batch:
        part = b.parts.get(self.config.rejected)
        if part is None:
            raise UserError(
                f"objective 'dpo': the data have no second sequence '{self.config.rejected}', only "
                f"{', '.join(b.parts) or 'none'}: set objective.transform to one that makes it"
            )
        return part

    def _pairs(self, b: Batch) -> Tensor:
        """`(M,)`: documents that have both answers."""
        have = [
            _by_document(x, (x.targets[..., 0] >= 0).float(), len(b.layout.slot)) > 0
            for x in (b, self._rejected(b))
        ]
        return have[0] & have[1]

    def _log_prob(self, net: Callable[..., ModelOut], b: Batch) -> tuple[Tensor, Tensor]:
        """`(M,)` log-probabilities of documents, and `(B T,)` what each place cost, float32."""
        every = replace(b, places={}, parts={})
        nll = net(every, heads=(self.config.head,)).heads[self.config.head].nll
        assert nll is not None  # targets were given
        cost = nll.float() * (b.targets[..., 0] >= 0).flatten()
        return -_by_document(b, cost.view_as(b.weight), len(b.layout.slot)), cost


def preference(margin: Tensor, form: Form, beta: float, smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, of its margin `(M,)`.

    That is how much more the preferred answer gained over the reference than the rejected one.
    """
    if form == "ipo":
        return (margin - 1 / (2 * beta)).square()
    x = beta * margin
    if form == "hinge":
        return (1 - x).relu()
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def _by_document(b: Batch, values_BT: Tensor, n: int) -> Tensor:
    """Sums `(n,)` over the places of each document."""
    document = b.layout.fields.document.flatten().long()
    return values_BT.new_zeros(n + 1).index_add(0, document, values_BT.flatten())[1:]
