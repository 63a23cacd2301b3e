"""A small transformer over the codebooks of one place: each is told those before it.

P places, D model, S streams, W width of its layers, N ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.layout import Fields, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.heads.parallel import Parallel, ParallelConfig
from mm.model.layer import Backbone
from mm.model.memories import refuse_memories
from mm.model.stateful import Stateful
from mm.registry import HEADS, BackboneField, LinearField
from mm.state import DataclassState, State

MOST = 64  # codebooks of a place
# Width times codebooks from which on a step from the State costs less than to run those before it
# again, as measured on a CPU (docs/lab-notes.md): a small step's cost is that of its many small
# operations.
REPAYS = 2048


@dataclass(frozen=True)
class Told(DataclassState):
    """What P places, each a slot, were told of their codebooks."""

    codes: Tensor  # (P, W) sum of the embeddings
    n: int  # codebooks
    layers: State | None


class Depth(Parallel):
    """``backbone(place[q] + sum of the embeddings of codebooks 0 to q - 1)`` predicts codebook q.

    The first of them takes the hidden state, too. The first codebook itself is what the head
    `tokens` says. Source: Lee et al. 2022 (arXiv:2203.01941), section 3.2.2, depth transformer.
    """

    def __init__(self, d_model: int, n_ids: int, config: DepthConfig):
        super().__init__(config.width, n_ids, config)
        self.width = config.width
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
        """None: nothing of a place is carried to the next one."""
        return []

    def initial_state(self, n: int, max_len: int) -> Told | None:
        """Of ``n`` places that are told at most ``max_len`` codebooks, one or more a call.

        None where so few of them are sooner run again.
        """
        return self.fresh(n, max_len) if self.width * max_len >= REPAYS else None

    def fresh(self, n: int, max_len: int) -> Told:
        """`initial_state`, however few the codebooks."""
        codes = self.codes.new_zeros(n, self.width)
        return Told(codes, 0, self.backbone.initial_state(n, max_len))

    def states(
        self, h_PD: Tensor, known_PS: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None, dict[str, Any]]:
        assert state is None or isinstance(state, Told)
        first = 0 if state is None else state.n
        known = known_PS[:, first:]
        P, S = known.shape
        told = nn.functional.embedding(known.clamp_min(0), self.codes)
        told = (told * (known >= 0)[..., None]).cumsum(1)
        told = told if state is None else told + state.codes[:, None]
        x = told + self.place[first : first + S]
        if first == 0:
            x = torch.cat((x[:, :1] + self.inp(h_PD)[:, None], x[:, 1:]), 1)
        inner = replace(
            ctx,
            layout=_rows(P, S, first, state is not None, known.device),
            mask=Causal(),
            ids=None,
            memories={},
            published={},
            draft=False,
            shard=None,
        )
        out = self.backbone(x, inner, None if state is None else state.layers)
        after = None if state is None else Told(told[:, -1], first + S, out.state)
        return out.y, after, dict(out.aux)


def _rows(P: int, S: int, first: int, slots: bool, device: torch.device) -> Layout:
    """P rows of S tokens of one document each, from the ``first`` on, made where they are.

    ``slots``: row i reads and writes slot i.
    """
    time = torch.arange(first, first + S, dtype=torch.int32, device=device).expand(P, S)
    document = torch.arange(1, P + 1, dtype=torch.int32, device=device)
    layout = Layout(
        Fields(time[..., None], document[:, None].expand(P, S), torch.zeros_like(time)),
        torch.arange(P + 1, dtype=torch.int32, device=device) * S,
        document - 1 if slots else torch.full_like(document, -1),
        torch.full((P,), first == 0, dtype=torch.bool, device=device),
        max_seqlen=S,
        aligned=True,
    )
    if not layout.is_on_host:
        layout.memo["host"] = lambda: _rows(P, S, first, slots, torch.device("cpu"))
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
