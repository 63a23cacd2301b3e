"""Distillation: a small model learns what a trained one says of every target.

P places of targets, N ids, B rows, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.init_from import InitFromField
from mm.model.layer import HeadOut, ModelOut
from mm.objectives.next_token import NextToken, NextTokenConfig
from mm.objectives.objective import Env, LossTerm, Network
from mm.registry import OBJECTIVES
from mm.vocabulary import Vocabulary

TEACHER, HIDDEN = "teacher", "hidden"
Divergence = Literal["forward", "reverse", "jensen_shannon"]


@OBJECTIVES.register("distil")
class DistilConfig(NextTokenConfig):
    """Next token, and beside it the distance to a frozen teacher's distribution.

    The total is ``(1 - alpha)`` times the loss of `next_token` and ``alpha`` times the distance,
    both weighed by modality alike.
    """

    kind: Literal["distil"] = "distil"
    teacher: InitFromField | None = Field(
        default=None,
        description="a run or saved model of the same vocabulary; default: the model as the stage "
        "begins with it, so that it is held near",
    )
    alpha: Annotated[float, Field(ge=0, le=1, description="share of the distance")] = 0.5
    divergence: Divergence = Field(
        default="forward",
        description="forward: KL(teacher, student), covers; reverse: KL(student, teacher), picks; "
        "jensen_shannon: between them by `beta`",
    )
    beta: Annotated[
        float, Field(gt=0, lt=1, description="jensen_shannon: share of the teacher in the mixture")
    ] = 0.5
    temperature: Annotated[float, Field(gt=0, description="of both distributions")] = 1.0
    hidden: dict[str, str] = Field(
        default={},
        description="layers whose outputs are drawn together, as {hidden.2: hidden.4}: student's "
        "to teacher's; both as wide",
    )
    hidden_weight: Annotated[float, Field(ge=0, description="of one less their cosine")] = 1.0

    small: ClassVar[Mapping[str, Any]] = {"hidden": {"hidden.1": "hidden.1"}}

    def build(self, vocabulary: Vocabulary | None = None) -> Distil:
        """Make the objective. Raises UserError as that of `next_token`."""
        base = super().build(vocabulary)
        assert vocabulary is not None  # the base refused that
        if self.masked is not None:
            raise UserError("objective.masked: 'distil' has no loss apart for masked places")
        return Distil(self, vocabulary, base.modalities)


class Distil(NextToken):
    """Sums over the targets of a modality of ``temperature ** 2`` times the divergence.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2; reverse and mixed: Agarwal et al.
    2023, GKD (arXiv:2306.13649), eq. 1 and section 3; hidden states by their cosine: Sanh et al.
    2019, DistilBERT (arXiv:1910.01108), section 2.
    """

    config: DistilConfig
    reads_codebooks = False

    def __init__(self, config: DistilConfig, vocabulary: Vocabulary, modalities: tuple[str, ...]):
        super().__init__(config, vocabulary)
        self.distances = {m: f"distil_{m}" for m in modalities}
        given = config.teacher
        follows = None if given is not None else "model"
        self.networks = {TEACHER: Network(None, "frozen", of=follows, init_from=given)}

    def counts(self, b: Batch) -> dict[str, Tensor]:
        places = b.places[self.config.head]
        each = self._split(b, b.weight.flatten()[places].float(), places)
        out = each | {self.distances[m]: n for m, n in each.items()} | self.aux_counts(b)
        return out | ({HIDDEN: _tokens(b).sum()} if self.config.hidden else {})

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The targets' losses, which compare with those of a run without a teacher."""
        return tuple(name for name in n if name in self.modalities)

    def scales(self, n: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        own = {k: v for k, v in n.items() if k != HIDDEN and k not in self.distances.values()}
        factors = dict(super().scales(own))
        if len(own) == len(n):  # held-out: as of `next_token`, with which it compares
            return factors
        alpha = self.config.alpha
        for m, name in self.distances.items():
            factors[name] = factors[m] * alpha
            factors[m] = factors[m] * (1 - alpha)
        return factors | ({HIDDEN: self.config.hidden_weight} if self.config.hidden else {})

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        c = self.config
        theirs = {"heads": (c.head,), "return_intermediates": frozenset(c.hidden.values())}
        ours = {"heads": (c.head,), "return_intermediates": frozenset(c.hidden)}
        for i, b in enumerate(micros):
            with torch.no_grad():
                told = nets[TEACHER](b, loss=False, **theirs)
            out = nets["model"](b, loss=False, **ours)
            places = b.places[c.head].long()
            weight = b.weight.flatten()[places]
            student, teacher = (_logits(x.heads[c.head]) for x in (out, told))
            target = b.targets[..., 0].flatten()[places].long()
            nll = torch.nn.functional.cross_entropy(student, target, reduction="none")
            far = divergence(student, teacher, c.divergence, c.temperature, c.beta)
            losses = self._split(b, nll * weight, places)
            drawn = self._split(b, far * weight, places)
            losses |= {self.distances[m]: v for m, v in drawn.items()}
            if c.hidden:
                losses[HIDDEN] = self._hidden(b, out, told)
            yield LossTerm(losses | self.aux_losses(out, b), step=i == len(micros) - 1)

    def _hidden(self, b: Batch, out: ModelOut, told: ModelOut) -> Tensor:
        """Sum over tokens of one less the cosine, the mean of all pairs of layers."""
        each = []
        for mine, its in self.config.hidden.items():
            x, y = out.intermediates.get(mine), told.intermediates.get(its)
            if x is None or y is None or x.shape != y.shape:
                found = ["none" if t is None else f"width {t.shape[-1]}" for t in (x, y)]
                raise UserError(
                    f"objective.hidden: {mine} of the model has {found[0]}, {its} of the teacher "
                    f"{found[1]}; name layers of both, as wide: hidden.0, hidden.1, ... or hidden"
                )
            cosine = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
            each.append(((1 - cosine) * _tokens(b)).sum())
        return torch.stack(each).mean()


def divergence(
    student: Tensor, teacher: Tensor, kind: Divergence, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """`(P,)` divergence of distributions over ids, times ``temperature ** 2``.

    Args:
        student: `(P, N)` logits.
        teacher: `(P, N)` logits.
        kind: which.
        beta: of ``jensen_shannon``: ``beta KL(t, m) + (1 - beta) KL(s, m)``, with the mixture
            ``m = beta t + (1 - beta) s``.
    """
    s, t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if kind == "forward":
        out = _kl(t, s)
    elif kind == "reverse":
        out = _kl(s, t)
    else:
        shares = torch.tensor([beta, 1 - beta], dtype=s.dtype, device=s.device).log()
        m = torch.logaddexp(t + shares[0], s + shares[1])
        out = beta * _kl(t, m) + (1 - beta) * _kl(s, m)
    return out * temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities `(P, N)`."""
    return (p.exp() * (p - q)).sum(-1)


def _logits(head: HeadOut) -> Tensor:
    """`(P, N)` float32. Raises UserError of a head without them."""
    logits = head.dist.logits if head.dist is not None else None
    if logits is None:
        raise UserError("objective 'distil' needs a head over ids: set model.heads.tokens: softmax")
    return logits.float()


def _tokens(b: Batch) -> Tensor:
    """`(B, T)`: 1 of a token of a document."""
    return (b.layout.fields.document > 0).float()
