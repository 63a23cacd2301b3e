"""Preference: an interleaved sample of a prompt and two answers, the preferred one first."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import MODALITY, Segment, Transform


@TRANSFORMS.register("preference")
class PreferenceConfig(Config):
    """The last two items of a sample are answers to what stands before; for the objective `dpo`.

    Prompt and preferred answer are the document, prompt and rejected answer its second sequence. A
    sample of fewer than two items, or whose answers are of two modalities, is filtered.
    """

    kind: Literal["preference"] = "preference"
    part: Annotated[
        str, Field(pattern=f"^{MODALITY}$", description="second sequence of the rejected answer")
    ] = "rejected"

    def build(self) -> Preference:
        return Preference(self.part)


class Preference(Transform):
    """See `PreferenceConfig`."""

    by_length = True

    def __init__(self, part: str):
        self.part, self.makes_parts = part, (part,)

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        if len(segments) < 2 or segments[-2].modality != segments[-1].modality:
            return None
        *prompt, preferred, rejected = segments
        prompt = [s._replace(role="condition") for s in prompt]
        second = [*prompt, rejected._replace(role="condition")]
        return [
            *prompt,
            preferred._replace(role="target"),
            *(s._replace(part=self.part) for s in second),
        ]
