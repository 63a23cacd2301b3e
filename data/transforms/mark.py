"""Mark: a named field of the layout, for masks and positions that tell segments apart."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import MODALITY, Segment, Transform


@TRANSFORMS.register("mark")
class MarkConfig(Config):
    """Number the segments of a document, 1, 2, ... in their order, under the name ``field``.

    With ``modalities`` only segments of these, 0 elsewhere: `mask: prefix` of such a field is one
    that reads each picture both ways.
    """

    kind: Literal["mark"] = "mark"
    field: Annotated[str, Field(pattern=f"^{MODALITY}$", description="its name")] = "segment"
    modalities: Annotated[
        tuple[str, ...] | None, Field(min_length=1, description="that are numbered; default all")
    ] = None

    def build(self) -> Mark:
        return Mark(self.field, self.modalities)


class Mark(Transform):
    """See `MarkConfig`."""

    by_length = True

    def __init__(self, field: str, modalities: tuple[str, ...] | None):
        self.field, self.modalities, self.makes_fields = field, modalities, (field,)

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        out, number = [], 0
        for s in segments:
            if s.role != "label" and (self.modalities is None or s.modality in self.modalities):
                number += 1
                s = s._replace(fields={**s.fields, self.field: number})
            out.append(s)
        return out
