"""What configs of mixers and feed-forward layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mm.config import Config
from mm.model.layer import LinearFactory
from mm.model.linears.dense import dense


class LayerConfig(Config):
    """A subclass names its ``layer``, made of the model's width, the config and `linear`."""

    layer: ClassVar[Callable[..., Any]]  # (d_model, config, linear) -> Layer

    def build(self, d_model: int, linear: LinearFactory = dense) -> Any:
        """Make the layer; it knows the kind that it was asked for by."""
        layer = self.layer(d_model, self, linear)
        layer.kind = self.kind  # type: ignore[attr-defined]
        return layer


class EvenHeadsConfig(LayerConfig):
    """Of a layer whose heads share the model's width evenly."""

    heads: Annotated[int, Field(gt=0)] = 4

    small: ClassVar = {"heads": 2}

    def build(self, d_model: int, linear: LinearFactory = dense) -> Any:
        """Make the layer.

        Raises:
            ValueError: heads that do not divide the model's width.
        """
        if d_model % self.heads:
            kind = self.kind  # type: ignore[attr-defined]
            raise ValueError(f"{kind}: d_model {d_model} is not a multiple of heads {self.heads}")
        return super().build(d_model, linear)
