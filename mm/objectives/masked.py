"""Masked modelling: ids are hidden, and predicted from what is on both sides of them.

B rows, T tokens, M documents, P places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mm.batch import Batch
from mm.errors import UserError
from mm.mask_expression import parse_mask
from mm.model.layer import ModelOut
from mm.objectives.next_token import NextToken, NextTokenConfig
from mm.registry import OBJECTIVES
from mm.vocabulary import MASK, Vocabulary

NOISE = "noise"  # of a step, equal on all ranks


@OBJECTIVES.register("masked")
class MaskedConfig(NextTokenConfig):
    """Cross-entropy of hidden codes, summed per modality; only codes of targets are hidden."""

    kind: Literal["masked"] = "masked"  # type: ignore[assignment]
    rate: Annotated[float, Field(gt=0, lt=1, description="share of the codes that are hidden")] = (
        0.15
    )
    max_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="then every document draws its own share between `rate` and this one",
    )
    shape: Annotated[
        Literal["uniform", "span", "block"],
        Field(description="single codes, spans of codes, or squares of a grid (runs of a line)"),
    ] = "uniform"
    length: Annotated[
        float, Field(ge=1, le=64, description="mean length of a span, side of a block")
    ] = 4.0
    random: Annotated[
        float, Field(ge=0, le=1, description="share of hidden codes that show another code")
    ] = 0.0
    kept: Annotated[float, Field(ge=0, le=1, description="share of hidden codes that stay")] = 0.0
    predicted_at: Annotated[
        Literal["own", "previous"],
        Field(description="the token whose output predicts a code: previous is a causal model's"),
    ] = "own"
    mask: Annotated[
        str, Field(description="who sees whom in this pass, whatever the model's mask is")
    ] = "full"

    @field_validator("mask")
    @classmethod
    def _is_a_mask(cls, text: str) -> str:
        parse_mask(text)
        return text

    def build(self, vocabulary: Vocabulary | None = None) -> Masked:
        super().build(vocabulary)
        assert vocabulary is not None
        if self.random + self.kept > 1:
            raise UserError("objective.random and objective.kept: together more than 1")
        if self.max_rate is not None and self.max_rate < self.rate:
            raise UserError("objective.max_rate: smaller than objective.rate")
        return Masked(self, vocabulary)


class Masked(NextToken):
    """Hide codes on the device; their places alone have a weight.

    What is hidden is a function of the step's noise and of each document, so that micro-batches and
    ranks change nothing.

    Source: Devlin et al. 2018, BERT (arXiv:1810.04805), section 3.1: 0.15, of which 0.8 show the
    mask id, 0.1 another, 0.1 stay. Spans: Joshi et al. 2019, SpanBERT (arXiv:1907.10529), section
    3.1, geometric lengths of mean 3.8, at most 10. A share for each document: Li et al. 2022, MAGE
    (arXiv:2211.09117), section 3.1, here uniform. Blocks: Bao et al. 2021, BEiT
    (arXiv:2106.08254), section 2.3, here squares of one size. Predicted at the token before, so
    that a causal model keeps its shift: BehnamGhader et al. 2024, LLM2Vec (arXiv:2404.05961).
    """

    reads_codebooks = False

    def __init__(self, config: MaskedConfig, vocabulary: Vocabulary):
        super().__init__(config, vocabulary)
        self.asked = config
        self.pass_mask = parse_mask(config.mask, vocabulary.numbers)
        ranges = [vocabulary.range(m) for m in vocabulary.modalities]
        codes = lambda r: (r.first, 0 if vocabulary.ranges[r.index - 1].continuous else r.stop)
        first, stop = zip((0, 0), *map(codes, ranges), strict=True)
        self.first, self.stop = torch.tensor(first), torch.tensor(stop)

    def check_model(self, model: nn.Module) -> None:
        backbone = getattr(model, "backbone", None)
        if backbone is not None:
            backbone.check_mask(self.pass_mask)

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """ "noise": what the step's documents hide."""
        return {NOISE: float(rng.integers(2**24))}

    def run_model(self, model: Callable[..., ModelOut], b: Batch) -> ModelOut:
        return model(b, mask=self.pass_mask)

    def corrupt(self, b: Batch, rng: Any, scheduled: Mapping[str, float]) -> Batch:
        c, f = self.asked, b.layout.fields
        B, T = f.document.shape
        ids, modality = b.ids[..., 0], f.modality.long()
        first, stop = (t.to(ids.device)[modality] for t in (self.first, self.stop))
        before = torch.zeros_like(ids, dtype=torch.bool)
        before[:, 1:] = b.weight[:, :-1] > 0  # the token before predicts it, so it is a target
        code = (ids >= first) & (ids < stop) & before
        noise = Noise(int(scheduled[NOISE]), b)
        hidden = code & self._hidden(noise, b, code)
        draw = noise.uniform("shown")
        other = first + (noise.uniform("other") * (stop - first)).to(ids.dtype)
        shown = torch.where(draw < c.random + c.kept, ids, MASK)
        shown = torch.where(hidden, torch.where(draw < c.random, other.to(ids.dtype), shown), ids)
        ids_after = torch.cat((shown[..., None], b.ids[..., 1:]), -1)
        if c.predicted_at == "previous":
            weight = torch.zeros_like(b.weight)
            weight[:, :-1] = b.weight[:, :-1] * hidden[:, 1:]
            return dataclasses.replace(b, ids=ids_after, weight=weight)
        weight = torch.zeros_like(b.weight)
        weight[:, 1:] = b.weight[:, :-1]
        labels = {**b.labels, "target_modality": f.modality}
        places = {**b.places, c.head: b.places[c.head] + 1}  # none is the last of its row
        return dataclasses.replace(
            b, ids=ids_after, targets=b.ids, weight=weight * hidden, labels=labels, places=places
        )

    def _hidden(self, noise: Noise, b: Batch, code: Tensor) -> Tensor:
        """`(B, T)` bool: which codes are hidden, were all places codes."""
        c = self.asked
        rate: Tensor | float = c.rate
        if c.max_rate is not None:
            rate = c.rate + (c.max_rate - c.rate) * noise.uniform("rate", by_place=False)
        if c.shape == "block":
            return noise.uniform("block", side=round(c.length)) < rate
        if c.shape == "uniform":
            return noise.uniform("hidden") < rate
        return self._spans(noise, code, rate)

    def _spans(self, noise: Noise, code: Tensor, rate: Tensor | float) -> Tensor:
        """Spans of geometric length, at most 2.6 times their mean, that may meet."""
        longest, stay = round(2.6 * self.asked.length), 1 - 1 / self.asked.length
        # P(a place is in no span) = prod over d of 1 - start * stay^d.
        reach = [stay**d for d in range(max(1, longest))]
        rate = torch.as_tensor(rate, device=code.device)
        start = rate / sum(reach)
        for _ in range(8):  # Newton's steps on the logarithm
            terms = torch.stack([1 - start * r for r in reach])
            slope = sum(r / t for r, t in zip(reach, terms, strict=True))
            start = start + (terms.log().sum(0) - (1 - rate).log()) / slope
        begins = code & (noise.uniform("span") < start)
        # Long enough to reach d places on, with probability stay^d.
        u = noise.uniform("length")
        hidden = inside = begins
        for r in reach[1:]:
            on = torch.zeros_like(inside)
            on[:, 1:] = (inside & (u < r))[:, :-1] & code[:, :-1]
            u = torch.cat((torch.ones_like(u[:, :1]), u[:, :-1]), 1)
            hidden, inside = hidden | on, on
        return hidden


class Noise:
    """Uniform numbers that depend on a step's seed, a document's ids and a place in it.

    Not on where the document stands: a hash of 32 bits in int64, as `splitmix` mixes.
    """

    def __init__(self, seed: int, b: Batch):
        self.f = b.layout.fields
        self.document = self.f.document.long()
        self.time = self.f.position[..., 0].long()
        each = mix(b.ids[..., 0].long() * 0x9E3779B1 + mix(self.time))
        M = b.layout.slot.shape[0]
        whole = torch.zeros(M + 1, dtype=torch.long, device=each.device)
        whole.index_add_(0, self.document.flatten(), each.flatten())
        self.own = mix(whole + mix(torch.tensor(seed, device=each.device)))[self.document]

    def uniform(self, name: str, by_place: bool = True, side: int = 0) -> Tensor:
        """`(B, T)` float32 in [0, 1) for a use of this name.

        ``side``: one number for a square of that side of a grid, or that many tokens of a line.
        """
        h = self.own + sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
        if side:
            on_grid = (self.f.position[..., 1:] != self.f.position[..., :1]).any(-1)
            start = torch.where(on_grid, 0, self.time)
            for axis in range(1, self.f.position.shape[-1]):
                at = self.f.position[..., axis].long()
                h = mix(h + torch.where(on_grid, at // side, 0))
            h = mix(h + start // side)
        elif by_place:
            h = mix(h + self.time * 0x85EBCA6B)
        return (mix(h) >> 8).to(torch.float32) / 2**24


def mix(x: Tensor) -> Tensor:
    """A hash of 32 bits of int64 numbers. Source: Wellons 2018, lowbias32."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
