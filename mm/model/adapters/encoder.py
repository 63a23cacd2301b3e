"""Any stack of the model's own layers over each item, both ways: an encoder as an adapter.

G items, L places of the longest, W width, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.layout import Doc, Grid, Layout
from mm.mask import Full
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput, Backbone
from mm.model.memories import refuse_memories
from mm.model.norm import LayerNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import build_added, refuse_drawn
from mm.registry import ADAPTERS, AdapterField, BackboneField, LinearField, PositionField


class EncoderAdapter(Adapter):
    """``out(backbone(norm(position(inner(values)))))``: each item sees itself alone.

    With patches, learned places and attention it is a ViT. Source: Dosovitskiy et al. 2020
    (arXiv:2010.11929), section 3.1. Every patch keeps its place; a class token takes part, before
    them, and is not handed on. The norm is CLIP's: Radford et al. 2021 (arXiv:2103.00020), section
    2.4. ``out`` is a linear map, or several with a GELU between: LLaVA-1.5 (arXiv:2310.03744),
    section 3.
    """

    def __init__(
        self,
        inner: Adapter,
        position: Position,
        backbone: Backbone,
        out: nn.Module,
        class_width: int | None = None,
        norm: LayerNorm | None = None,
    ):
        super().__init__()
        token = None if class_width is None else nn.Parameter(torch.empty(1, class_width))
        self.class_token = token
        self.inner, self.position, self.backbone, self.out = inner, position, backbone, out
        self.norm = norm
        self.keeps_length = inner.keeps_length
        backbone.check_mask(Full())

    def init_weights(self) -> None:
        for layer in self.out.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def zero_item(self, device: torch.device) -> Tensor:
        """That of the inner adapter."""
        return self.inner.zero_item(device)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        filled = self.inner(values, ctx)
        assert filled.x is not None
        x, length, before = filled.x, filled.length, 0
        if self.class_token is not None:
            first = self.class_token.to(x.dtype).expand(len(x), 1, -1)
            x, length, before = torch.cat((first, x), 1), length + 1, 1
        layout = layout_of(values, x, length, self.inner.keeps_length, before)
        own = Ctx(layout, Full()) if ctx is None else replace(
            ctx, layout=layout, mask=Full(), ids=None, memories={}, published={}, draft=False
        )  # fmt: skip
        x = self.position.embed(x, layout.fields)
        y = self.backbone(x if self.norm is None else self.norm(x), own)
        return AdapterOutput(
            self.out(y.y[:, before:]), None, filled.length, aux={**filled.aux, **y.aux}
        )


def layout_of(values: Values, x: Tensor, length: Tensor, keeps: bool, before: int = 0) -> Layout:
    """A row for each item, made on the host where it knows the lengths.

    ``before``: places of ``x`` and of ``length`` before the item's own.
    """
    G, L = x.shape[:2]
    grids: list[tuple[int, ...]] = [()] * G
    if keeps and values.grid is not None:
        sizes = [before + rows * columns for rows, columns in values.grid]
        grids = [shape if shape[0] > 1 else () for shape in values.grid]
    elif keeps and values.is_full:
        sizes = [L] * G
    else:
        sizes = length.tolist()
    docs = [
        [Doc(n, grids=[Grid(before, shape)] if shape else [])]
        for n, shape in zip(sizes, grids, strict=True)
    ]
    return Layout.from_rows(docs, L, G, 3).to(x.device)


@ADAPTERS.register("encoder")
class EncoderAdapterConfig(Config):
    """Layers of ``width`` over what another adapter makes of an item."""

    kind: Literal["encoder"] = "encoder"
    inner: Annotated[AdapterField, Field(description="adapter that makes the encoder's input")] = (
        Field(default="linear", validate_default=True)
    )
    width: Annotated[int, Field(gt=0, le=2**16, description="of the encoder's layers")] = 128
    backbone: BackboneField = Field(default="stack", validate_default=True)
    position: Annotated[
        PositionField, Field(description="added to the encoder's input: learned, sinusoidal, grid")
    ] = Field(default="none", validate_default=True)
    linear: LinearField = Field(default="dense", validate_default=True)
    class_token: bool = Field(
        default=False, description="a learned vector before each item, which is not handed on"
    )

    input_norm: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="eps of a LayerNorm of what the layers read, as CLIP has it"
    )
    out_layers: Annotated[int, Field(gt=0, le=8)] = Field(
        default=1, description="linear maps to d_model, a GELU between two of them"
    )

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def build(self, d_model: int) -> EncoderAdapter:
        position = build_added(self.position, self.width)
        refuse_drawn(position, "an adapter")
        backbone = self.backbone.build(self.width, self.linear.build)
        refuse_memories(backbone, "adapter encoder, backbone")
        return EncoderAdapter(
            self.inner.build(self.width),
            position,
            backbone,
            self._out(d_model),
            self.width if self.class_token else None,
            None if self.input_norm is None else LayerNorm(self.width, self.input_norm),
        )

    def _out(self, d_model: int) -> nn.Module:
        """A linear map, or ``0``, ``2``, .. of a sequence of them."""
        maps: list[nn.Module] = [nn.Linear(self.width, d_model)]
        for _ in range(self.out_layers - 1):
            maps += [nn.GELU(), nn.Linear(d_model, d_model)]
        return maps[0] if len(maps) == 1 else nn.Sequential(*maps)

    @classmethod
    def smallest(cls) -> EncoderAdapterConfig:
        inner: Any = {"kind": "linear", "d_in": 3}
        backbone: Any = {"kind": "stack", "depth": 1, "pattern": "attention"}
        return cls(inner=inner, width=8, backbone=backbone)
