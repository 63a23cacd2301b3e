"""Positions drawn anew for each pass of training. B rows, T tokens, A axes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.noise import generator
from mm.model.positions.base import Position
from mm.registry import POSITIONS, PositionField


class Randomised(nn.Module, Position):
    """Another position with times drawn from a longer range in training.

    They are distinct, drawn and sorted once a pass, and shared by its documents and layers; a
    training pass without a seed, and inference, keep the true ones.

    Masks, windows and caches go by the true times. (The paper draws at test time too.)

    Source: Ruoss et al. 2023 (arXiv:2305.16843), section 3.
    """

    def __init__(self, inner: Position, length: int):
        super().__init__()
        self.inner, self.length = inner, length
        self.length_general = inner.length_general
        self.key = inner.key and f"randomised.{length}.{inner.key}"

    def ids(self, f: Fields, ctx: Ctx) -> Tensor:
        """`(B, T, A)` positions with drawn times.

        Raises:
            UserError: a document is longer than the range.
        """
        layout = ctx.layout if ctx.shard is None else ctx.shard.whole
        n = layout.max_seqlen
        if isinstance(ctx.seed, int) and ctx.seed == 0 or not n:
            return f.position
        if n > self.length:
            raise UserError(
                f"randomised positions: a document of {n} tokens in a range of {self.length}; "
                "raise length"
            )
        device = f.position.device
        drawn = generator(ctx, None, "positions", device)  # the same of every layer
        times = torch.randperm(self.length, generator=drawn, device=device)[:n].sort().values
        time = times[f.position[..., 0].long().clamp(0, n - 1)].to(f.position.dtype)
        return torch.cat((time[..., None], f.position[..., 1:]), -1)

    def prepare(self, f: Fields) -> Any:
        return self.inner.prepare(f)

    def apply(self, x: Tensor, prepared: Any) -> Tensor:
        return self.inner.apply(x, prepared)

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        return self.inner.embed(x_BTD, f)

    def rotate(self, q: Tensor, k: Tensor, fq: Fields, fk: Fields) -> tuple[Tensor, Tensor]:
        return self.inner.rotate(q, k, fq, fk)


class RandomisedScores(Randomised):
    """With an inner position that changes scores: only then does attention ask for them."""

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor | None:
        return self.inner.score(q, fq, fk)

    def gain(self, fq: Fields, fk: Fields) -> Tensor | None:
        return self.inner.gain(fq, fk)

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        return self.inner.scores(q, fq, fk)


def adds_to_input(position: Position) -> bool:
    """Whether a position or its inner one is added to a layer's input (`Position.embed`)."""
    while isinstance(position, Randomised):
        position = position.inner
    return type(position).embed is not Position.embed


def build_added(config: Any, width: int) -> Position:
    """The position of a config, which is added to vectors of ``width``.

    Raises:
        ValueError: it belongs into a mixer.
    """
    position = config.build(width, d_model=width)
    if type(position) is not Position and not adds_to_input(position):
        raise ValueError(
            f"position '{config.kind}' adds nothing to embeddings: it belongs to a mixer"
        )
    return position


def refuse_drawn(position: Position, mixer: str) -> None:
    """Raise UserError where a mixer would not ask a position for its drawn ids."""
    if type(position).ids is not Position.ids:
        raise UserError(f"{mixer} knows no positions that are drawn: use them in attention")


@POSITIONS.register("randomised")
class RandomisedConfig(Config):
    """Random, ordered positions in training for any other position."""

    kind: Literal["randomised"] = "randomised"
    inner: PositionField = Field(default="rope", validate_default=True)
    length: Annotated[int, Field(gt=0, description="range that positions are drawn from")] = 2048

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Randomised:
        inner = self.inner.build(head_dim, heads=heads, d_model=d_model)
        scored = any(
            getattr(type(inner), hook) is not getattr(Position, hook)
            for hook in ("score", "gain", "scores")
        )
        return (RandomisedScores if scored else Randomised)(inner, self.length)
