"""All further codebooks of a place at once, each by its own rows of a matrix.

P places, D model, N ids, S streams: the first is that of the head `tokens`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.cross_entropy import linear_cross_entropy
from mm.model.context import Ctx
from mm.model.heads.softmax import Categorical
from mm.model.layer import Head, HeadOut, zero_gradient_touch
from mm.registry import HEADS
from mm.specs import Delays
from mm.state import State
from mm.vocabulary import Range


class Parallel(Head):
    """Codebook q of a place by a softmax over its own ids, of the hidden state alone.

    Those of one frame are independent, given what is before: so they are delayed. Source: Copet et
    al. 2023 (arXiv:2306.05284), section 2.2.
    """

    shard = "local"
    predicts_ids = False

    def __init__(self, d_model: int, n_ids: int, config: ParallelConfig):
        super().__init__()
        self.reads, self.tied, self.delays = config.reads, config.tied, config.delays
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))

    def init_weights(self) -> None:
        if not self.tied:
            nn.init.normal_(self.weight, std=0.25 * self.weight.shape[1] ** -0.5)

    def books(self, stream: int) -> list[tuple[int, int, Range]]:
        """First id and end of the ids that a stream may hold, and the range, a modality each."""
        specs = [self.vocabulary.spec(m) for m in self.delays if m in self.vocabulary.modalities]
        several = [spec for spec in specs if spec.n_codebooks > stream]
        found = []
        for spec in several:
            r = self.vocabulary.range(spec.modality)
            first = r.first + stream * spec.vocab_size
            found.append((first, first + spec.vocab_size, r))
        return found

    def states(
        self, h_PD: Tensor, known_PS: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None, dict[str, Any]]:
        """Hidden states of streams 1 to S `(P, S, D)`, told the ids of streams 0 to S - 1.

        They are as the rows of `weight` read them. With a ``state`` of those that it was not told
        yet alone. Then the State after them, and what is reported.
        """
        return self.narrow(h_PD)[:, None].expand(-1, known_PS.shape[1], -1), state, {}

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
        *,
        known: Tensor | None = None,
    ) -> HeadOut:
        """Sum of the nll of all streams but the first, or the distribution of the next one.

        Args:
            target: `(P, S)` int ids of all streams, -1 = none.
            known: `(P, n)` int ids of the first streams, where there is no target: the
                distribution is that of stream n, -inf at ids that are not of that codebook of the
                first one's modality.
            state: `initial_state` of P places, or that of a call with fewer streams of theirs:
                only what it was not told is computed.
        """
        h = h_BTD.flatten(0, 1).index_select(0, places_P.long())
        if target is None:
            known = h.new_zeros(len(h), 1, dtype=torch.long) if known is None else known
            states, state, aux = self.states(h, known, ctx, state)
            return HeadOut(None, Categorical(self._logits(states, known)), state, aux)
        wide = torch.promote_types(h.dtype, torch.float32)
        ids = target.long() if target.dim() == 2 else target.long()[:, None]
        nll = h.new_zeros(len(h), dtype=wide)
        if ids.shape[1] == 1:
            return HeadOut(nll + zero_gradient_touch(self.parameters(), nll), None)
        # Its own parameters alone: those of layers below are used where ZeRO-3 gathers them.
        nll = nll + zero_gradient_touch(self.parameters(recurse=False), nll)
        # A micro-batch without any code runs one place of zeros, so that all ranks run alike.
        some = len(h) > 0
        given = h if some else h.new_zeros(1, h.shape[1])
        told = ids if some else ids.new_zeros(1, ids.shape[1])
        states, _, aux = self.states(given, told[:, :-1], ctx)
        for q in range(1, ids.shape[1]):
            for first, stop, _ in self.books(q):
                own = (told[:, q] >= first) & (told[:, q] < stop)
                at = torch.where(own, told[:, q] - first, 0)
                cost = linear_cross_entropy(states[:, q - 1], self.weight[first:stop], at)
                nll = nll + torch.where(own, cost, 0) if some else nll + 0 * cost.sum()
        return HeadOut(nll, None, aux=aux)

    def _logits(self, states: Tensor, known_PS: Tensor) -> Tensor:
        """`(P, N)` of the stream after ``known``, from `states` `(P, S, D)`."""
        logits = nn.functional.linear(states[:, -1], self.weight.to(states.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        other = torch.zeros_like(logits, dtype=torch.bool)
        for first, stop, r in self.books(known_PS.shape[1]):
            mine = (known_PS[:, 0] >= r.begin) & (known_PS[:, 0] < r.stop)
            other |= mine[:, None]
            other[:, first:stop] &= ~mine[:, None]
        return logits.masked_fill(other, -torch.inf)


@HEADS.register("parallel")
class ParallelConfig(Config):
    """A softmax for every codebook of a place but the first; its name is `codes`.

    The transform `delay` lays them out.
    """

    kind: Literal["parallel"] = "parallel"
    delays: Annotated[
        Delays, Field(description="modality -> places that each codebook waits, as the data have")
    ] = {}
    reads: Annotated[str, Field(description="hidden states that it reads")] = "hidden"
    tied: Annotated[bool, Field(description="read the embedder's table")] = False

    def build(self, d_model: int, n_ids: int) -> Parallel:
        return Parallel(d_model, n_ids, self)
