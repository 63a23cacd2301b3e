"""Contrast of two modalities of a sample: each finds its own among those of all ranks.

N pairs of this rank, E width, M documents, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.errors import UserError
from mm.layout import Layout
from mm.model.layer import ModelOut
from mm.objectives.objective import AuxWeights, Env, LossTerm, Objective
from mm.registry import OBJECTIVES, TransformField
from mm.vocabulary import Vocabulary

LOSS = "contrastive"
PRIME, MODULUS = 1_000_003, 2**45 - 55  # products of ids below 2**18 stay exact in 63 bits


@OBJECTIVES.register("contrastive")
class ContrastiveConfig(Config):
    """InfoNCE of the vectors that a head `embedding` gives of ``pair``, both ways.

    The two stand in one sample and are read as documents of their own. Samples whose second
    modality is the same (captions that name a class) are right answers for each other.
    """

    kind: Literal["contrastive"] = "contrastive"
    pair: Annotated[tuple[str, str], Field(description="modalities that are compared")]
    head: Annotated[str, Field(description="of the model, of kind embedding")] = "embedding"
    transform: TransformField | None = None
    aux_weights: AuxWeights = {}

    @classmethod
    def smallest(cls) -> ContrastiveConfig:
        return cls(pair=("image", "text"))

    def build(self, vocabulary: Vocabulary | None = None) -> Contrastive:
        """Make the objective.

        Raises UserError where the vocabulary lacks one of the pair.
        """
        for name in self.pair:
            if vocabulary is None or name not in vocabulary.modalities:
                known = ", ".join(vocabulary.modalities) if vocabulary is not None else "nothing"
                raise UserError(f"objective.pair: the vocabulary has no '{name}', only {known}")
        if self.pair[0] == self.pair[1]:
            raise UserError(f"objective.pair: '{self.pair[0]}' is compared with itself")
        assert vocabulary is not None
        return Contrastive(self, *(vocabulary.range(name).index for name in self.pair))


class Side(NamedTuple):
    """Both documents of every sample of a micro-batch, (M, 2) each."""

    last: Tensor  # int64 flat place of the last token
    there: Tensor  # bool (M,): the sample has both
    content: Tensor  # float64 (M,): equal where the second modality says the same


class Contrastive(Objective):
    """Exact over micro-batches and ranks: vectors of all, their gradients, then one pass each.

    Sources: Gao et al. 2021 (GradCache, arXiv:2101.06983), section 3.2; loss both ways: Radford et
    al. 2021 (arXiv:2103.00020); equal texts as right answers: Yang et al. 2022 (UniCL,
    arXiv:2204.03610), section 3.2.
    """

    def __init__(self, config: ContrastiveConfig, first: int, second: int):
        self.config, self.numbers = config, (first, second)
        self.transform, self.aux_weights = config.transform, config.aux_weights

    def corrupt(self, b: Batch, rng: Any, scheduled: Mapping[str, float]) -> Batch:
        """Each modality of the pair becomes a document: 2 m - 1 and 2 m of document m.

        Raises UserError where a sample alternates between them.
        """
        b = replace(b, layout=self.apart(b.layout))
        number = b.layout.on_host().fields.document.flatten()
        number = number[number > 0]
        if (number[1:] < number[:-1]).any():
            raise UserError(
                "objective.pair: a sample has several parts of one of "
                f"{' and '.join(self.config.pair)}: give it one of each"
            )
        return replace(b, places={**b.places, self.config.head: self._side(b).last.flatten()})

    def apart(self, layout: Layout) -> Layout:
        """The layout with a document for each of the pair; what is of neither becomes padding."""
        M, device = layout.slot.shape[0], layout.slot.device
        wide = replace(
            layout,
            slot=torch.full((2 * M,), -1, dtype=torch.int32, device=device),
            fresh=torch.ones(2 * M, dtype=torch.bool, device=device),
            aligned=False,
        )
        if not layout.is_on_host:
            host = self.apart(layout.on_host())
            made = wide.derive(document=self._numbered(layout))
            made.memo["host"] = lambda: host
            return made
        return wide.derive(document=self._numbered(layout))

    def _numbered(self, layout: Layout) -> Tensor:
        """In the order in which they stand, as documents must be."""
        f = layout.fields
        one, two = (f.modality == n for n in self.numbers)
        document = f.document.flatten().long()
        at = torch.arange(len(document), device=document.device)
        begin = torch.full((layout.slot.shape[0] + 1,), len(at), device=at.device)
        first, second = (
            begin.scatter_reduce(0, torch.where(mine.flatten(), document, 0), at, "amin")
            for mine in (one, two)
        )
        one_leads = (first < second)[document].view_as(one)
        number = 2 * f.document - (one == one_leads).to(f.document.dtype)
        return torch.where((f.document > 0) & (one | two), number, 0)

    def _side(self, b: Batch) -> Side:
        document = b.layout.fields.document.flatten().long()
        M = b.layout.slot.shape[0]
        at = torch.arange(len(document), device=document.device)
        last = torch.zeros(M + 1, dtype=torch.long, device=document.device)
        last = last.scatter_reduce(0, document, at, "amax")[1:].view(-1, 2)
        swapped = (b.layout.fields.modality.flatten()[last[:, 1]] == self.numbers[0])[:, None]
        size = torch.zeros(M + 1, dtype=torch.long, device=document.device)
        size = size.index_add(0, document, torch.ones_like(document))[1:].view(-1, 2)
        begin = b.layout.cu_seqlens[:-1].long()
        place = at - torch.cat((begin.new_zeros(1), begin))[document]
        code = ((b.ids[..., 0].flatten().long() + 2) * (place + 7) * PRIME) % MODULUS
        content = torch.zeros(M + 1, dtype=torch.long, device=document.device)
        both = content.index_add(0, document, code)[1:].view(-1, 2) % MODULUS
        last, both = (torch.where(swapped, t.flip(1), t) for t in (last, both))
        return Side(last, (size > 0).all(1), both[:, 1].double())

    def counts(self, b: Batch) -> dict[str, Tensor]:
        return {LOSS: self._side(b).there.sum().float()} | self.aux_counts(b)

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        sides = [self._side(b) for b in micros]
        learns = torch.is_grad_enabled()
        with torch.no_grad():
            own = torch.cat(
                [self._vectors(nets, b, s)[0] for b, s in zip(micros, sides, strict=True)]
            )
            there = torch.cat([s.there for s in sides])
            content = torch.cat([s.content for s in sides])
            every, also, what = (env.gather(t) for t in (own, there.float(), content))
        with torch.enable_grad():
            every = every.requires_grad_()
            total = info_nce(every, also > 0, what)
            (grad,) = torch.autograd.grad(total, every)
        begin = _rank() * len(own)
        # Reported as the loss, differentiated as its gradient times the vectors
        share = total.detach() / (len(micros) * (len(every) // max(1, len(own))))
        for i, (b, side) in enumerate(zip(micros, sides, strict=True)):
            n = len(side.there)
            aux: dict[str, Tensor] = {}
            if learns:
                x, out = self._vectors(nets, b, side)
                pulled = (x * grad[begin : begin + n]).sum()
                value = pulled - pulled.detach() + share
                aux = self.aux_losses(out, b)
            else:
                value = share
            begin += n
            yield LossTerm({LOSS: value, **aux}, step=i == len(micros) - 1)

    def _vectors(
        self, nets: Mapping[str, Callable[..., ModelOut]], b: Batch, side: Side
    ) -> tuple[Tensor, ModelOut]:
        """`(N, 2, E)` vectors of a micro-batch."""
        head = self.config.head
        out = nets["model"](b, heads=(head,), loss=False)
        said: Any = out.heads[head].dist
        return said.mean.view(len(side.last), 2, -1), out


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def info_nce(pairs_N2E: Tensor, there_N: Tensor, content_N: Tensor) -> Tensor:
    """Sum over the pairs of the mean of both directions' cross-entropies, ().

    Args:
        pairs_N2E: vectors whose products are logits.
        there_N: which pairs count.
        content_N: equal where two second vectors are of the same thing: all are right answers, with
            equal shares.
    """
    a, b = pairs_N2E.unbind(1)
    logits = (a @ b.T).float()
    seen = there_N[:, None] & there_N
    logits = logits.masked_fill(~seen, -torch.inf)
    right = ((content_N[:, None] == content_N) & seen).float()
    right = right / right.sum(1, keepdim=True).clamp_min(1)
    total = logits.new_zeros(())
    for scores in (logits, logits.T):
        log_p = scores.masked_fill(~there_N[:, None], 0.0).log_softmax(1)
        log_p = log_p.masked_fill(~seen, 0.0)
        total = total - 0.5 * (right * log_p).sum()
    return total
