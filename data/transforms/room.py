"""Room: how many places a modality's values keep where the adapter does not fill one with each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform

NO_ID = np.int32(-1)


@TRANSFORMS.register("room")
class RoomConfig(Config):
    """Keep ``places`` for every item, or one for every ``every`` values, rounded up.

    Places that the adapter leaves empty become padding; what does not fit is dropped.
    """

    kind: Literal["room"] = "room"
    modality: Annotated[str, Field(description="of values")] = "image"
    places: Annotated[int | None, Field(gt=0, description="of every item")] = None
    every: Annotated[int | None, Field(gt=0, description="values that share a place")] = None

    @model_validator(mode="after")
    def _one(self) -> RoomConfig:
        if (self.places is None) == (self.every is None):
            raise ValueError("room: set either places or every")
        return self

    @classmethod
    def smallest(cls) -> RoomConfig:
        return cls(places=4)

    def build(self) -> Room:
        return Room(self.modality, self.places, self.every)


class Room(Transform):
    """See `RoomConfig`."""

    by_length = True

    def __init__(self, modality: str, places: int | None, every: int | None):
        self.modality, self.places, self.every = modality, places, every

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [self._kept(s) if s.modality == self.modality else s for s in segments]

    def _kept(self, s: Segment) -> Segment:
        if s.ids is None:
            return s
        n = self.places or -(-len(s.ids) // (self.every or 1))
        return s._replace(ids=np.broadcast_to(NO_ID, n), room=n)
