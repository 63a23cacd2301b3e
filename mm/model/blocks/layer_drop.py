"""Stochastic depth: a block that some documents pass by in training.

B rows, T tokens, D model, M documents.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, FeedForward, Mixer, Out
from mm.model.noise import uniform
from mm.registry import BLOCKS, BlockField
from mm.state import State


class LayerDrop(Block):
    """``x + b (block(x) - x) / (1 - rate)``, b 0 with probability ``rate``, else 1.

    Every document draws by itself, in every layer; outside training the block is as it is. Steps
    take no less time: documents of one pass differ, and all ranks run the same layers.

    Source: Huang et al. 2016 (arXiv:1603.09382), eq. 2, with the factor of eq. 5 in training
    instead; of whole transformer layers: Fan et al. 2019, LayerDrop (arXiv:1909.11556), section 3.
    """

    caps = Caps(shard="local")

    def __init__(self, block: Block, rate: float):
        super().__init__()
        self.block, self.rate = block, rate

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        out = self.block(x_BTD, ctx, state)
        if not (self.rate and self.training):
            return out
        n = ctx.layout.cu_seqlens.shape[0]  # documents are numbered from 1
        device = x_BTD.device
        drawn = uniform(n, ctx, self, "layer", device)  # type: ignore[reportCallIssue]  untyped
        document = ctx.layout.fields.document
        if ctx.shard is not None:  # all processes that share a document draw alike
            document = ctx.shard.slice(ctx.shard.whole.fields.document)
        kept = (drawn >= self.rate)[document.long()][..., None]
        y = torch.where(kept, x_BTD + (out.y - x_BTD) / (1 - self.rate), x_BTD)
        return out._replace(y=y)


@BLOCKS.register("layer_drop")
class LayerDropConfig(Config):
    """Another block that documents skip at random in training; for deep stacks and small data."""

    kind: Literal["layer_drop"] = "layer_drop"
    rate: float = Field(default=0.1, ge=0, lt=1, description="share of documents that skip it")
    block: BlockField = Field(default="prenorm", validate_default=True)

    small = {"rate": 0.0}  # the laws compare passes, which draw differently

    def build(self, d_model: int, mixer: Mixer, ffn: FeedForward | None = None) -> LayerDrop:
        return LayerDrop(cast(Any, self.block).build(d_model, mixer, ffn), self.rate)
