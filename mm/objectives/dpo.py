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
Form = Literal["sigmoid", "hinge", "ipo", "kto", "orpo"]


@OBJECTIVES.register("dpo")
class DpoConfig(Config):
    """Preferences between two answers, by default direct preference optimisation.

    It is against a frozen reference, but for `orpo`, which needs none.

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
        "1 / (2 beta) by squares; kto: each answer against the mean gain of the others; orpo: the "
        "odds of a token, without a reference, beta times it beside nll",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="sigmoid: share of pairs that are the wrong way"
    )
    nll: float | None = Field(
        default=None,
        ge=0,
        description="factor of the preferred answers' own next-token loss; default 0, of orpo 1",
    )
    undesirable: float = Field(
        default=1.0, gt=0, description="kto: weight of the rejected answers beside the preferred"
    )
    head: str = "tokens"

    def build(self, vocabulary: Any = None) -> Dpo:
        """Make the objective. Raises ValueError of settings that do not go together."""
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is of loss: sigmoid, not {self.loss}")
        if self.reference is not None and self.loss == "orpo":
            raise ValueError("loss: orpo has no reference; leave it out")
        return Dpo(self)


class Dpo(Objective):
    """A sum over pairs, of log-probabilities of whole documents.

    The prompt's share is the same in both answers of a pair, so that it cancels in a margin. Where
    answers count alone (`kto`, `orpo`), they begin at the first place of the preferred document
    that has a weight, and as far behind the same prompt in the rejected one. Besides the loss, the
    share of pairs with a positive margin (``accuracy``) and the mean margin are reported; they have
    no weight.

    Source: Rafailov et al. 2023, DPO (arXiv:2305.18290), eq. 7; label smoothing: Mitchell 2023;
    hinge: Zhao et al. 2023, SLiC-HF (arXiv:2305.10425); IPO: Azar et al. 2023 (arXiv:2310.12036),
    eq. 17; the preferred answer's own loss: Pang et al. 2024 (arXiv:2404.19733), eq. 1; KTO:
    Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 8, of pairs: `kahneman_tversky`; ORPO: Hong et
    al. 2024 (arXiv:2403.07691), eq. 6 and 7: `log_odds`.
    """

    def __init__(self, config: DpoConfig):
        self.config, self.transform = config, config.transform
        odds = config.loss == "orpo"
        self.nll = float(odds) if config.nll is None else config.nll
        scale = config.beta if odds else 1.0
        self.weights = {"dpo": scale, "nll": self.nll, "accuracy": 0.0, "margin": 0.0}
        if odds:
            return
        given = config.reference
        follows = None if given is not None else "model"
        self.networks = {REFERENCE: Network(None, "frozen", of=follows, init_from=given)}

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The loss and the share of pairs that are the right way round."""
        return ("dpo", "accuracy")

    def counts(self, b: Batch) -> dict[str, Tensor]:
        n = self._pairs(b).sum().float()
        out = {"dpo": n, "accuracy": n, "margin": n}
        return out | ({"nll": b.weight.sum()} if self.nll else {})

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        c = self.config
        gains = self._mean_gains(micros, nets, env) if c.loss == "kto" else None
        for i, b in enumerate(micros):
            pairs = self._pairs(b).float()
            better, worse, cost = self._scores(b, nets)
            h = (better - worse) * pairs
            if gains is not None:
                each = kahneman_tversky(better, worse, gains, c.beta, c.undesirable)
            else:
                each = preference(h, c.loss, c.beta, c.label_smoothing)
            losses = {
                "dpo": (each * pairs).sum(),
                "accuracy": ((h.detach() > 0) * pairs).sum(),
                "margin": h.detach().sum(),
            }
            if self.nll:
                losses["nll"] = (cost * b.weight.flatten()).sum()
            yield LossTerm(losses, step=i == len(micros) - 1)

    def _scores(
        self, b: Batch, nets: Mapping[str, Callable[..., ModelOut]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What each form compares, `(M,)` of both answers, and the cost `(B T,)` of the first.

        That is how much more likely an answer is than in the reference, or its `log_odds`.
        """
        both = (b, self._rejected(b))
        whole = self.config.loss not in ("kto", "orpo")
        where = [None, None] if whole else _answers(*both)
        after = [self._log_prob(nets["model"], x, on) for x, on in zip(both, where, strict=True)]
        if self.config.loss == "orpo":
            scores = [
                log_odds(now / _by_document(x, on.float(), len(now)).clamp_min(1))  # type: ignore[union-attr]
                for (now, _), x, on in zip(after, both, where, strict=True)
            ]
        else:
            with torch.no_grad():
                net = nets[REFERENCE]
                was = [self._log_prob(net, x, on)[0] for x, on in zip(both, where, strict=True)]
            scores = [now - before for (now, _), before in zip(after, was, strict=True)]
        return scores[0], scores[1], after[0][1]

    @torch.no_grad()
    def _mean_gains(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> tuple[Tensor, Tensor]:
        """Mean gain of the preferred and of the rejected answers of a step, 0 at least."""
        sums = []
        for b in micros:
            pairs = self._pairs(b).float()
            better, worse, _ = self._scores(b, nets)
            sums.append(torch.stack([(better * pairs).sum(), (worse * pairs).sum(), pairs.sum()]))
        total = env.gather(torch.stack(sums).sum(0)[None]).sum(0)
        mean = (total[:2] / total[2].clamp_min(1)).clamp_min(0)
        return mean[0], mean[1]

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

    def _log_prob(
        self, net: Callable[..., ModelOut], b: Batch, on: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(M,)` log-probabilities of documents, and `(B T,)` what each place cost, float32.

        ``on``: `(B T,)`, the places that count; default all.
        """
        every = replace(b, places={}, parts={})
        nll = net(every, heads=(self.config.head,)).heads[self.config.head].nll
        assert nll is not None  # targets were given
        cost = nll.float() * (b.targets[..., 0] >= 0).flatten()
        counted = cost if on is None else cost * on
        return -_by_document(b, counted, len(b.layout.slot)), cost


def preference(margin: Tensor, form: Form, beta: float, smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, of its margin `(M,)`.

    That is how much more the preferred answer gained over the reference than the rejected one.
    """
    if form == "ipo":
        return (margin - 1 / (2 * beta)).square()
    if form == "orpo":  # beta is a factor of the loss
        return -F.logsigmoid(margin)
    x = beta * margin
    if form == "hinge":
        return (1 - x).relu()
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def kahneman_tversky(
    better: Tensor, worse: Tensor, gains: tuple[Tensor, Tensor], beta: float, undesirable: float
) -> Tensor:
    """`(M,)` losses ``1 - s(beta (r_w - z_l)) + u (1 - s(beta (z_w - r_l)))``, s the sigmoid.

    Args:
        better: `(M,)` log-ratios r_w of the preferred answers to the reference.
        worse: `(M,)` r_l of the rejected ones.
        gains: z_w and z_l, estimates of the divergence from the reference: the mean of each kind,
            0 at least. The paper takes it from answers to other prompts; with pairs its authors'
            code takes that of the other kind, as here.
    """
    z_w, z_l = gains
    desired = 1 - torch.sigmoid(beta * (better - z_l))
    return desired + undesirable * (1 - torch.sigmoid(beta * (z_w - worse)))


def log_odds(mean: Tensor) -> Tensor:
    """``log P / (1 - P)`` of ``log P`` (M,), the mean log-probability of an answer's tokens."""
    mean = mean.clamp_max(-1e-6)
    return mean - torch.log(-torch.expm1(mean))


def _answers(b: Batch, rejected: Batch) -> list[Tensor]:
    """`(B T,)` bool of both: places that predict the answers alone."""
    local = [_place(x) for x in (b, rejected)]
    M, far = len(b.layout.slot), b.ids.shape[0] * b.ids.shape[1]
    document = b.layout.fields.document.flatten().long()
    weighed = (b.weight.flatten() > 0) & (b.targets[..., 0].flatten() >= 0)
    at = torch.where(weighed, local[0], far)
    first = at.new_full((M + 1,), far).scatter_reduce(0, document, at, "amin")
    out = []
    for x, place in zip((b, rejected), local, strict=True):
        there = x.layout.fields.document.flatten().long()
        out.append((place >= first[there]) & (x.targets[..., 0].flatten() >= 0) & (there > 0))
    return out


def _place(b: Batch) -> Tensor:
    """`(B T,)`: how many places of its document stand before each."""
    document = b.layout.fields.document.flatten().long()
    every = torch.arange(len(document), device=document.device)
    return every - b.layout.cu_seqlens.long()[(document - 1).clamp_min(0)]


def _by_document(b: Batch, values_BT: Tensor, n: int) -> Tensor:
    """Sums `(n,)` over the places of each document."""
    document = b.layout.fields.document.flatten().long()
    return values_BT.new_zeros(n + 1).index_add(0, document, values_BT.flatten())[1:]
