"""To part: conditions leave the main sequence for a second one, such as an encoder's source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import TRANSFORMS
from mm.specs import MODALITY, Segment, Transform


@TRANSFORMS.register("to_part")
class ToPartConfig(Config):
    """Move conditions into the second sequence ``part`` of their document.

    It comes after the transform that says what is a condition (`any_to_any`). The model embeds each
    part as it embeds the main sequence and hands it on as a memory of that name.
    """

    kind: Literal["to_part"] = "to_part"
    part: Annotated[str, Field(pattern=f"^{MODALITY}$", description="its name")] = "source"
    modalities: Annotated[
        tuple[str, ...] | None, Field(min_length=1, description="that move; default all conditions")
    ] = None

    def build(self) -> ToPart:
        return ToPart(self.part, self.modalities)


class ToPart(Transform):
    """See `ToPartConfig`."""

    by_length = True

    def __init__(self, part: str, modalities: tuple[str, ...] | None):
        self.part, self.modalities, self.makes_parts = part, modalities, (part,)

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [s._replace(part=self.part) if self._moves(s) else s for s in segments]

    def _moves(self, s: Segment) -> bool:
        if self.modalities is None:
            return s.role == "condition" and not s.part
        if s.modality in self.modalities and s.role != "condition":
            raise UserError(
                f"to_part: '{s.modality}' is a {s.role} here, only conditions are read: name it "
                "before the '>' of any_to_any.tasks"
            )
        return s.modality in self.modalities and not s.part
