"""A small transformer over the codebooks of one place: each is told those before it.

P places, D model, S streams, W width of its layers, N ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.layout import Fields, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.heads.parallel import Parallel, ParallelConfig
from mm.model.layer import Backbone, Stateful
from mm.model.memories import refuse_memories
from mm.registry import HEADS, BackboneField, LinearField

MOST = 64  # codebooks of a place


class Depth(Parallel):
    """``backbone(place[q] + sum of the embeddings of codebooks 0 to q - 1)`` predicts codebook q.

    The first of them takes the hidden state, too. The first codebook itself is what the head
    `tokens` says. Source: Lee et al. 2022 (arXiv:2203.01941), section 3.2.2, depth transformer.
    """

    def __init__(self, d_model: int, n_ids: int, config: DepthConfig):
        super().__init__(config.width, n_ids, config)
        self.inp = nn.Linear(d_model, config.width)
        self.codes = nn.Parameter(torch.empty(n_ids, config.width))
        self.place = nn.Parameter(torch.empty(MOST, config.width))
        self.backbone: Backbone = config.backbone.build(config.width, config.linear.build)
        refuse_memories(self.backbone, "head depth, backbone")
        self.backbone.check_mask(Causal())

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.codes, std=1.0)
        nn.init.normal_(self.place, std=0.02)
        nn.init.normal_(self.inp.weight, std=self.inp.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.inp.bias)

    def stateful_parts(self) -> list[Stateful]:
        """None: the codebooks of a place are told together."""
        return []

    def states(self, h_PD: Tensor, known_PS: Tensor, ctx: Ctx) -> tuple[Tensor, dict[str, Any]]:
        P, S = known_PS.shape
        told = nn.functional.embedding(known_PS.clamp_min(0), self.codes)
        told = (told * (known_PS >= 0)[..., None]).cumsum(1)
        h = self.inp(h_PD)
        x = told.to(h.dtype) + self.place[:S].to(h.dtype)
        x = torch.cat((x[:, :1] + h[:, None], x[:, 1:]), 1)
        inner = replace(
            ctx,
            layout=_rows(P, S, h.device),
            mask=Causal(),
            ids=None,
            memories={},
            published={},
            draft=False,
            shard=None,
        )
        out = self.backbone(x, inner)
        return out.y, dict(out.aux)


def _rows(P: int, S: int, device: torch.device) -> Layout:
    """P rows of one document of S tokens each, made where they are."""
    time = torch.arange(S, dtype=torch.int32, device=device).expand(P, S)
    document = torch.arange(1, P + 1, dtype=torch.int32, device=device)
    layout = Layout(
        Fields(time[..., None], document[:, None].expand(P, S), torch.zeros_like(time)),
        torch.arange(P + 1, dtype=torch.int32, device=device) * S,
        torch.full((P,), -1, dtype=torch.int32, device=device),
        torch.ones(P, dtype=torch.bool, device=device),
        max_seqlen=S,
        aligned=True,
    )
    if not layout.is_on_host:
        layout.memo["host"] = lambda: _rows(P, S, torch.device("cpu"))
    return layout


@HEADS.register("depth")
class DepthConfig(ParallelConfig):
    """Layers of ``width`` over the codebooks of a place; its name is `codes`.

    With delays of 0 a frame is predicted from the frames before it, and within it one codebook
    after another.
    """

    kind: Literal["depth"] = "depth"  # type: ignore[assignment]
    width: Annotated[int, Field(gt=0, le=2**16, description="of its layers")] = 128
    backbone: BackboneField = Field(
        default={"kind": "stack", "depth": 2, "pattern": "attention"}, validate_default=True
    )
    linear: LinearField = Field(default="dense", validate_default=True)
    tied: Literal[False] = False  # type: ignore[assignment]

    small = {"width": 8, "backbone": {"kind": "stack", "depth": 1, "pattern": "attention"}}

    def build(self, d_model: int, n_ids: int) -> Depth:
        return Depth(d_model, n_ids, self)
