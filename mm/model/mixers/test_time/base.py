"""Mixers whose hidden state is a model that learns from the tokens, a mini-batch at a time.

B rows, T tokens, N slots, R rows of one document, L their length, C tokens of a mini-batch, P
tokens from before it that its first tokens still learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import Mixer
from mm.model.varlen import PackedRows, per_document
from mm.state import DataclassState, State

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Learnt(DataclassState):
    """The inner model at the last border of mini-batches, and what tokens gave since."""

    weights: Tensors  # (N, ...) each
    features: Tensors  # (N, P + C - 1, ...) each: P tokens before the border, then those after it
    count: Tensor  # (N,) int64 tokens after the border


def _at(x: Tensor, index_NL: Tensor) -> Tensor:
    """`(N, L, ...)`: what dim 1 holds at ``index``."""
    shape = (*index_NL.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index_NL.view(shape).expand(*index_NL.shape, *x.shape[2:]))


class Learner(Mixer):
    """A mixer that runs `learn` over mini-batches of its documents, counted from their start.

    Gradients of a mini-batch are taken at its border, so its tokens run beside one another.
    Subclasses set ``batch`` (C) and ``context`` (P).
    """

    documents_apart = True
    batch: int
    context: int = 0

    def start(self) -> Tensors:
        """The inner model before the first token."""
        raise NotImplementedError

    def learn(self, weights: Tensors, features: Tensors) -> tuple[Tensor, Tensors]:
        """Outputs `(R, C, ...)` of a mini-batch and the inner model after it.

        Args:
            weights: the inner model before it, `(R, ...)` each.
            features: what its tokens and P before them gave, `(R, P + C, ...)` each.
        """
        raise NotImplementedError

    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        """What a token gives, each without rows and tokens."""
        raise NotImplementedError

    def learn_documents(
        self, features: Tensors, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Outputs `(B, T, ...)` of the documents of a call, and the State after it."""
        if state is None:
            return per_document(lambda *x: self._first(x), ctx, *features), None
        assert isinstance(state, Learnt)
        N, kept = state.count.shape[0], self.context + self.batch - 1
        docs, start = PackedRows.of(ctx.layout, N), self.start()
        rows = [docs.unpack(f) for f in features]
        L = rows[0].shape[1]
        count = docs.read(state.count, 0)
        weights = tuple(docs.read(w, s) for w, s in zip(state.weights, start, strict=True))
        # Tokens of the slot, then at once those of the call.
        at = torch.arange(kept + L, device=count.device)
        held = self.context + count[:, None]
        source = torch.where(at < held, at, kept + at - held).clamp_max(kept + L - 1)
        joined = tuple(
            _at(torch.cat((docs.read(p).to(f.dtype), f), 1), source)
            for p, f in zip(state.features, rows, strict=True)
        )
        y, borders = self._run(weights, joined)
        own = count[:, None] + torch.arange(L, device=count.device)
        out = docs.pack(_at(y, own.clamp_max(y.shape[1] - 1)) if L else y[:, :0])
        return out, self._after(state, docs, count, joined, borders)

    def _first(self, features: Tensors) -> Tensor:
        """Outputs of rows that begin here."""
        R = features[0].shape[0]
        weights = tuple(w.expand(R, *w.shape) for w in self.start())
        before = lambda f: f.new_zeros(R, self.context, *f.shape[2:])
        return self._run(weights, tuple(torch.cat((before(f), f), 1) for f in features))[0]

    def _after(
        self, state: Learnt, docs: PackedRows, count: Tensor, features: Tensors, borders: Any
    ) -> Learnt:
        """The State after a call: the last border that rows reached, and what came since.

        Args:
            count: `(R,)` tokens after the first border when the call began.
            features: of P tokens before the first border and all after it.
            borders: the inner model at every border, `Tensors` each.
        """
        kept = self.context + self.batch - 1
        total = count + docs.length
        border = total // self.batch
        left = total - border * self.batch
        index = torch.arange(kept, device=total.device)
        past = index >= self.context + left[:, None]  # the last token
        source = border[:, None] * self.batch + index

        def since(f: Tensor) -> Tensor:
            f = _at(f, source.clamp_max(f.shape[1] - 1))
            return f.masked_fill(past.view(*past.shape, *[1] * (f.dim() - 2)), 0)

        last = (_at(torch.stack(b, 1), border[:, None])[:, 0] for b in zip(*borders, strict=True))
        return docs.write(
            state, weights=tuple(last), features=tuple(map(since, features)), count=left
        )

    def _run(self, weights: Tensors, features: Tensors) -> tuple[Tensor, list[Tensors]]:
        """Outputs of the tokens after the first P, and the inner model at every border."""
        P, C = self.context, self.batch
        L = features[0].shape[1] - P
        rest = -L % C
        padded = [F.pad(f, (*[0, 0] * (f.dim() - 2), 0, rest)) for f in features]
        # Each mini-batch with the P tokens before it.
        parts = [f.unfold(1, P + C, C).movedim(-1, 2).unbind(1) for f in padded] if L else []
        outputs, borders = [], [weights]
        for chunk in zip(*parts, strict=True):
            y, weights = self.learn(weights, chunk)
            outputs.append(y)
            borders.append(weights)
        return (torch.cat(outputs, 1)[:, :L] if outputs else features[0][:, :0]), borders

    def initial_state(self, n: int, max_len: int) -> Learnt:
        start, kept = self.start(), self.context + self.batch - 1
        zeros = lambda *shape: start[0].detach().new_zeros(n, kept, *shape)
        return Learnt(
            tuple(w.detach().expand(n, *w.shape).clone() for w in start),
            tuple(zeros(*shape) for shape in self.feature_shapes()),
            torch.zeros(n, dtype=torch.long, device=start[0].device),
        )
