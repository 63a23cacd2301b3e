"""Turn whatever a config says about transforms into one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform


class Chain(Transform):
    """Transforms one after the other; None from any of them filters the sample out."""

    def __init__(self, parts: Sequence[Transform]):
        self.parts = tuple(parts)

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        current: list[Segment] | None = segments
        for part in self.parts:
            if current is None:
                return None
            current = part(current, rng)
        return current


def chain(*values: Any) -> Chain:
    """Build a `Chain` from None, a Transform, a config, its dict or kind, or sequences of these."""
    parts: list[Transform] = []
    for value in values:
        if value is None:
            continue
        if isinstance(value, Transform):
            parts.append(value)
        elif isinstance(value, (list, tuple)):
            parts.extend(chain(*value).parts)
        else:
            config: Config = TRANSFORMS.parse(value)
            parts.append(config.build())
    return Chain(parts)
