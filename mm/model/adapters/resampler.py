"""Learned queries that read an item: any number of values to a fixed number of places.

G items, L places of the inner adapter, Q queries, D model, H heads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput
from mm.registry import ADAPTERS, AdapterField


class ResamplerLayer(nn.Module):
    """Queries attend to the item and to themselves, then a feed-forward layer; both residual."""

    def __init__(self, d_model: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_x = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.norm_f = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def init_weights(self) -> None:
        for norm in (self.norm_q, self.norm_x, self.norm_f):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        for linear in (self.query, self.key_value, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, q_GQD: Tensor, x_GLD: Tensor, seen_GQS: Tensor) -> Tensor:
        """``seen`` `(G, 1, L + Q)` bool: which values and queries there are."""
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        normed = self.norm_q(q_GQD)
        both = torch.cat((self.norm_x(x_GLD), normed), 1)
        k, v = self.key_value(both).chunk(2, -1)
        y = nn.functional.scaled_dot_product_attention(
            split(self.query(normed)), split(k), split(v), seen_GQS[:, None]
        )
        q = q_GQD + self.out(y.transpose(1, 2).flatten(2))
        return q + self.down(nn.functional.gelu(self.up(self.norm_f(q))))


class Resampler(Adapter):
    """``queries`` learned vectors read what another adapter makes of an item.

    An item of fewer values takes as many queries as it has values. Source: Alayrac et al. 2022
    (Flamingo, arXiv:2204.14198), section 3.1 and figure 5: keys of the item and of the queries.
    """

    looked_up = ("queries",)

    def __init__(self, inner: Adapter, d_model: int, config: ResamplerConfig):
        super().__init__()
        self.inner = inner
        self.queries = nn.Parameter(torch.empty(config.queries, d_model))
        self.layers = nn.ModuleList(
            ResamplerLayer(d_model, config.heads, config.hidden) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(d_model)

    def init_weights(self) -> None:
        nn.init.normal_(self.queries, std=1.0)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """That of the inner adapter."""
        return self.inner.zero_item(device)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        filled = self.inner(values, ctx)
        assert filled.x is not None
        G, L = filled.x.shape[:2]
        Q = len(self.queries)
        length = filled.length.clamp_max(Q)
        at = lambda n: torch.arange(n, device=filled.x.device)
        there = torch.cat((at(L) < filled.length[:, None], at(Q) < length[:, None]), 1)[:, None]
        # An item of nothing would see nothing, which no softmax can take.
        seen = there | (there.sum(-1, keepdim=True) == 0)
        q = self.queries.to(filled.x.dtype).expand(G, -1, -1)
        for layer in self.layers:
            q = layer(q, filled.x, seen)
        return AdapterOutput(self.norm(q), None, length, aux=filled.aux)


@ADAPTERS.register("resampler")
class ResamplerConfig(Config):
    """A fixed number of places for items of any size.

    Give the data the transform `room` with as many ``places``: else each item keeps a place for
    every value, most of which become padding.
    """

    kind: Literal["resampler"] = "resampler"
    inner: Annotated[AdapterField, Field(description="adapter whose output is read")] = Field(
        default="linear", validate_default=True
    )
    queries: Annotated[int, Field(gt=0, le=2**16, description="places of an item, at most")] = 16
    depth: Annotated[int, Field(gt=0, le=64, description="layers")] = 2
    heads: Annotated[int, Field(gt=0, description="of attention")] = 4
    hidden: Annotated[int, Field(gt=0, description="width of the feed-forward layers")] = 256

    @model_validator(mode="after")
    def _not_itself(self) -> ResamplerConfig:
        if self.inner.kind == self.kind:
            raise ValueError("resampler: its inner adapter is a resampler already")
        return self

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def build(self, d_model: int) -> Resampler:
        if d_model % self.heads:
            raise ValueError(
                f"resampler: d_model {d_model} is not a multiple of heads {self.heads}"
            )
        return Resampler(self.inner.build(d_model), d_model, self)

    @classmethod
    def smallest(cls) -> ResamplerConfig:
        inner: Any = {"kind": "linear", "d_in": 3}
        return cls(inner=inner, queries=8, depth=1, heads=2, hidden=8)
