"""Chunk: a window of a long segment, so that documents fit a row."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


@TRANSFORMS.register("chunk")
class ChunkConfig(Config):
    """Keep at most ``tokens`` codes of a modality; the window is drawn anew in every epoch."""

    kind: Literal["chunk"] = "chunk"
    modality: Annotated[str, Field(description="modality whose spans are cut")] = "text"
    tokens: Annotated[int, Field(gt=0, description="codes kept; begin and end come on top")] = 254
    window: Annotated[
        Literal["random", "first"], Field(description="where the kept codes start")
    ] = "random"

    @classmethod
    def smallest(cls) -> ChunkConfig:
        return cls(modality="text", tokens=254)

    def build(self) -> Chunk:
        return Chunk(self.modality, self.tokens, self.window)


class Chunk(Transform):
    """See `ChunkConfig`. The `end` of a window that stops before its text does is no target."""

    by_length = True

    def __init__(self, modality: str, tokens: int, window: str):
        self.modality, self.tokens, self.window = modality, tokens, window

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [
            self._cut(s, rng) if s.modality == self.modality and s.ids is not None else s
            for s in segments
        ]

    def _cut(self, s: Segment, rng: Any) -> Segment:
        spare = len(s.ids) - self.tokens
        if spare <= 0:
            return s
        start = int(rng.integers(spare + 1)) if self.window == "random" else 0
        return window(s, start, start + self.tokens)


def window(s: Segment, start: int, stop: int) -> Segment:
    """Codes ``start`` to ``stop`` of a segment.

    Marks its `end` as no target where the segment goes on.
    """
    ids = s.ids[start:stop]
    if s.room:
        raise UserError(
            f"'{s.modality}' fills {s.room} places together, which cannot be cut: put the "
            "transform `room` after `chunk`"
        )
    s = s._replace(
        position=None if s.position is None else s.position[start:stop],
        fields={k: v[start:stop] if np.ndim(v) else v for k, v in s.fields.items()},
    )
    # Of values, 0: each predicts itself
    own = ids if s.values is None else np.zeros(len(ids), np.int32)
    own = own[:, 0] if np.ndim(own) == 2 else own
    targets = own if s.targets is None else s.targets[start:stop]
    if stop < len(s.ids):
        targets = np.append(targets, -1)
    elif s.targets is not None:
        targets = s.targets[start:]
    else:
        targets = None
    if s.values is not None:  # what is left of a grid is none
        return s._replace(ids=ids, values=s.values[start:stop], targets=targets, grid=())
    return s._replace(ids=ids, targets=targets)
