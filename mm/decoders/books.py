"""Codebooks that share a place: which of them a place holds, and what each is.

N sequences, n of them running, C codebooks, V ids, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.batch import Batch
from mm.data.batching.codebooks import CODES, flat_codes, lay_out
from mm.data.batching.collate import to_batch
from mm.data.transforms.delay import Delay
from mm.decoders.base import Ask, Rule, Session, draw
from mm.decoders.rules import NEVER, span_grammar
from mm.errors import UserError
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import ModelOut
from mm.specs import Segment
from mm.vocabulary import Range, Vocabulary


def delays_of(model: Any) -> Mapping[str, tuple[int, ...]]:
    """How the model reads codebooks in one place: modality -> places that each waits."""
    heads = getattr(model, "heads", {})
    return getattr(heads[CODES], "delays", {}) if CODES in heads else {}


def laid_out(model: Any, documents: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
    """Documents of flat codes as the model reads them.

    A forward that is not training takes this, or `documents_batch`, and lays nothing out itself.
    """
    lay = Delay(delays_of(model))
    return [lay(list(document)) for document in documents]


def documents_batch(
    model: Any, vocabulary: Vocabulary, documents: Sequence[Sequence[Segment]]
) -> Batch:
    """One document a row, as the model reads it, on the host."""
    return to_batch([[document] for document in laid_out(model, documents)], vocabulary)


def require_one_book(model: Any, modality: str, who: str) -> None:
    """Raise UserError where the model reads several codebooks of ``modality`` in one place."""
    if modality in delays_of(model):
        raise UserError(
            f"{who}: the model has several codes of '{modality}' in one place, this takes one id a "
            "place: another modality"
        )


def local_codes(
    row: np.ndarray, given: Sequence[int], r: Range, delays: Sequence[int]
) -> np.ndarray:
    """Local codes `(L,)` int32 of a span whose steps gave ``row`` (steps,) or (steps, C) ids.

    ``given``: those that it goes on from.
    """
    continued = np.asarray(given, np.int64)
    own = (row >= r.first) & (row < r.stop)
    if row.ndim == 1:
        return np.concatenate([continued, row[own] - r.first]).astype(np.int32)
    before = lay_out(continued, delays)[: len(continued) // len(delays)]
    return flat_codes(np.concatenate([before, np.where(own, row - r.first, -1)])).astype(np.int32)


class Books:
    """The places of N spans with several codebooks each.

    Book q holds frame ``place - delays[q]``, where the span has it. How many frames that is says
    the first one's `end`, or the limit.
    """

    def __init__(self, model: Any, ask: Ask, rules: Sequence[Rule], device: torch.device):
        self.head, self.ask, self.device = model.heads[CODES], ask, device
        self.rules = [rule for rule in rules if rule is not span_grammar]
        self.delays, self.range = np.array(ask.delays), ask.vocabulary.range(ask.to)
        self.frames = np.array(ask.limit)  # (n,) that the span has, as far as is known
        self.longest = int(self.delays.max())

    def hidden(self, out: ModelOut, batch: Batch) -> Tensor:
        """`(P, D)` what the head reads at the places that are asked."""
        of = out.hidden if self.head.reads == "hidden" else out.intermediates[self.head.reads]
        return of.flatten(0, 1).index_select(0, batch.places["tokens"].long())

    def fill(
        self,
        first: Tensor,
        hidden: Tensor,
        layout: Any,
        place: np.ndarray,
        session: Session,
        alive: np.ndarray,
        uniform: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Ids `(n, C)` of this place, -1 = none, and () whether all logits were finite.

        Args:
            first: (n,) ids that were drawn for the first book.
            hidden: (n, D), with guidance (2 n, D).
            place: (n,) places of the span before this one, on the host.
            alive: (n,) numbers of the sequences.
            uniform: (n, C) of the noise; None: the likeliest.
        """
        n, spec, ask = len(first), self.ask.vocabulary.spec(self.ask.to), self.ask
        over = torch.from_numpy(place >= self.frames).to(self.device)
        ids = [torch.where(over, self.range.end, first)]
        # As it is learnt: the first `end` is predicted, and told to the other books; those after it
        # are read alone.
        after = torch.from_numpy(place > self.frames).to(self.device)
        told = torch.where(after, -1, ids[0])
        ended = ids[0] == self.range.end
        fine = torch.ones((), dtype=torch.bool, device=self.device)
        state = self.head.initial_state(len(hidden), len(self.delays) - 1)
        for q in range(1, len(self.delays)):
            frame = place - self.delays[q]
            has = (frame >= 0) & (frame < self.frames)
            if not has.any():
                ids.append(torch.full_like(first, -1))
                continue
            known = torch.stack([told, *ids[1:]], 1).repeat(len(hidden) // n, 1)
            at = torch.arange(len(hidden), device=self.device)
            out = self.head(hidden[None], Ctx(layout, Causal()), at, state=state, known=known)
            said, state = out.dist.logits, out.state
            begin = self.range.first + q * spec.vocab_size
            own = said[:, begin : begin + spec.vocab_size]
            own = own if own.dtype == torch.float64 else own.float()
            if len(hidden) > n:
                own = own[n:] + ask.cfg_scale * (own[:n] - own[n:])
            fine = fine & (own < torch.inf).all()
            logits = torch.full((n, said.shape[1]), NEVER, dtype=own.dtype, device=self.device)
            logits[:, begin : begin + spec.vocab_size] = own
            for rule in self.rules:
                logits = rule(logits, session)
            new = logits.argmax(-1) if uniform is None else draw(logits, uniform[:, q])
            there = torch.from_numpy(has).to(self.device)
            if self.delays[q] == 0:  # of the frame that the first book says is not there
                there = there & ~ended
            new = torch.where(there, new, -1)
            ids.append(self._given(new, q, place, alive))
        return torch.stack(ids, 1), fine

    def _given(self, new: Tensor, q: int, place: np.ndarray, alive: np.ndarray) -> Tensor:
        """``new`` (n,), or what the prompt said of this book already."""
        if self.ask.known is None or not self.longest:
            return new
        step = np.minimum(place - self.ask.have[alive], self.longest)
        padded = np.pad(self.ask.known, ((0, 0), (0, 1), (0, 0)), constant_values=-1)
        told = torch.from_numpy(padded[alive, step, q].astype(np.int64)).to(self.device)
        return torch.where(told >= 0, told, new)

    def finish(self, drawn: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(n,) bool: which spans are whole with the ids ``drawn`` (n, C) of this place."""
        ends = (drawn[:, 0] == self.range.end) & (place < self.frames)
        self.frames = np.where(ends, place, self.frames)
        return place + 1 >= self.frames + self.longest

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the sequences."""
        self.frames = self.frames[kept]
