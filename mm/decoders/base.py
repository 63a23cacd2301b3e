"""What every way of generating shares: Ask, Session, Rule, and the plug point Decoder.

N sequences, V vocabulary, U prompt rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mm.batch import Batch
from mm.model.layer import ModelOut
from mm.specs import TokenSpec
from mm.vocabulary import Range, Vocabulary


@dataclass(frozen=True, slots=True)
class Ask:
    """What a decoder shall produce: one span of modality ``to`` for each of N sequences.

    Several sequences may start from one prompt row (samples of one prompt, one null prompt for
    all): the prompt is computed once and its state is copied.
    """

    vocabulary: Vocabulary
    to: str
    row: np.ndarray  # (N,) prompt row of each sequence
    have: np.ndarray  # (N,) ids of the span that the prompt holds already (continuation)
    limit: np.ndarray  # (N,) most ids of the span, the prompt's included; the span is closed there
    null_row: np.ndarray | None = None  # (N,) prompt row without the condition, for guidance
    cfg_scale: float = 1.0
    greedy: bool = False
    seed: int = 0
    indices: Sequence[int] | None = (
        None  # (N,) number of each sequence in the noise; default 0, 1, 2, ...
    )
    # Places that each codebook waits, where one place holds a code of each: then `have` and `limit`
    # count places of the first one. (): one id a place
    delays: tuple[int, ...] = ()
    # (N, longest delay, C) ids that the prompt holds of the places after it, -1 = none
    known: np.ndarray | None = None

    @property
    def spec(self) -> TokenSpec:
        """That of ``to``, of a single codebook where all share a place."""
        spec = self.vocabulary.spec(self.to)
        return spec._replace(n_codebooks=1) if self.delays else spec


@dataclass(slots=True)
class Session:
    """What a Rule may know of the N sequences still running; the decoder keeps it up to date."""

    vocabulary: Vocabulary
    to: str
    length: Tensor  # (N,) int64 ids of the span so far
    limit: Tensor  # (N,) int64 most ids of the span
    step: int = 0
    ids: Tensor | None = None  # (N, step) int64 vocabulary ids produced so far
    memo: dict[str, Any] = field(
        default_factory=dict
    )  # tables that a rule wants to compute once a session
    one_book: bool = False  # a place holds codes of all codebooks: the rules see the first one

    @property
    def spec(self) -> TokenSpec:
        spec = self.vocabulary.spec(self.to)
        return spec._replace(n_codebooks=1) if self.one_book else spec

    @property
    def range(self) -> Range:
        return self.vocabulary.range(self.to)


Rule = Callable[
    [Tensor, Session], Tensor
]  # logits (N, V), session -> logits (N, V); -inf = cannot be sampled


class Decoder(ABC):
    """Plug point: a way of generating. Beams, speculation, masked decoding are further files."""

    needs_grad: ClassVar[bool] = False

    @abstractmethod
    def run(
        self,
        nets: Mapping[str, Callable[..., ModelOut]],
        prompt: Batch,
        ask: Ask,
        rules: Sequence[Rule],
    ) -> Iterator[Tensor]:
        """Yield `(N,)` int64 CPU tensors of vocabulary ids, one a step; -1 where one is done.

        With ``ask.delays`` `(N, C)`, -1 also where a place has no code of a codebook.

        Args:
            nets: "model" is a language model with `initial_state(n, max_len)`.
            prompt: U rows of one document each, ``places["tokens"]`` the last place of each row.
            ask: what to produce.
            rules: applied to the logits in order, before sampling.
        """


def is_fixed(spec: TokenSpec) -> int | None:
    """Ids of a whole span of a modality with a grid, or None where the length is free."""
    return int(np.prod(spec.grid)) * spec.n_codebooks if spec.grid else None


def noise(seed: int, indices: Sequence[int], steps: int) -> Tensor:
    """Draw uniform numbers `(N, steps)` float64; row i depends on (seed, indices[i]) alone.

    So what is sampled for a prompt does not depend on which others share its batch.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed % 2**64, index % 2**64])).random(steps)
        for index in indices
    ]
    table = torch.from_numpy(np.stack(rows) if rows else np.zeros((0, steps)))
    # Away from 1, so that the scaled number stays below the last cumulative sum in float64.
    return table.clamp_(max=1 - 2.0**-32)


def draw(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Sample one id a row, `(N,)` int64; an id of logit -inf is never drawn.

    Inverts the cumulative distribution: one uniform number decides, whatever the vocabulary's size.
    """
    total_NV = torch.softmax(logits_NV.double(), -1).cumsum(-1)
    at_N1 = uniform_N[:, None].to(total_NV) * total_NV[:, -1:]
    return torch.searchsorted(total_NV, at_N1, right=True)[:, 0]
