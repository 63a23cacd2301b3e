"""To label: segments leave the sequence and label their document, for a head such as CTC."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


@TRANSFORMS.register("to_label")
class ToLabelConfig(Config):
    """Take modalities out of the sequence: the head of their name predicts them of the document.

    What it reads must stay: put `any_to_any` with a task such as ``audio>text`` first. ``keep``
    leaves them in the sequence, too.
    """

    kind: Literal["to_label"] = "to_label"
    modalities: Annotated[
        tuple[str, ...], Field(min_length=1, description="that become labels")
    ] = ("text",)
    keep: Annotated[bool, Field(description="in the sequence as well")] = False

    def build(self) -> ToLabel:
        return ToLabel(self.modalities, self.keep)


class ToLabel(Transform):
    """See `ToLabelConfig`."""

    by_length = True

    def __init__(self, modalities: tuple[str, ...], keep: bool):
        self.makes_labels, self.keep = modalities, keep

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        own = [s for s in segments if s.modality in self.makes_labels]
        gone = () if self.keep else self.makes_labels
        rest = [s for s in segments if s.modality not in gone]
        return [*rest, *(s._replace(role="label") for s in own if s.ids is not None)]
