"""Encoder and decoder: what is given is read both ways, what follows attends to it.

B rows, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Layout
from mm.mask import Full, Mask, Prefix
from mm.model.backbones.stack import INTERMEDIATE, Stack, StackConfig
from mm.model.context import Ctx, Memory
from mm.model.layer import Backbone, Caps, Layer, LinearFactory, Out, zero_gradient_touch
from mm.model.linears.dense import dense
from mm.model.memories import MEMORIES, memories_read
from mm.model.mixers.wrappers.reverse import both_ways
from mm.model.recompute import Recompute
from mm.model.split import Part, split_off
from mm.model.stateful import Stateful
from mm.model.varlen import PackedRows
from mm.registry import BACKBONES, BlockField
from mm.state import DataclassState, State

SOURCE = "source"  # the memory that the encoder makes
CONDITIONS = "prefix"  # the field that marks the conditions which a document begins with


@dataclass(frozen=True)
class DraftDecoder(DataclassState):
    """The decoder's State after a draft call that began with conditions."""

    decoder: State
    given: Tensor  # (N,) conditions of each slot's document in the call

    def accept(self, n_N: Tensor) -> State:
        return self.decoder.accept((n_N.to(self.given) - self.given).clamp_min(0))

    def commit(self) -> State:
        return self.decoder.commit()


class EncoderDecoder(Backbone):
    """A decoder over what an encoder made of each document's conditions.

    The conditions that a document begins with go through the encoder alone, which reads them both
    ways; all that follows goes through the decoder alone, under the pass's mask. Heads read the
    encoder's output where conditions stand. A pass with a State runs the encoder where documents
    begin: conditions come whole, in one call. ``path`` and intermediates are the decoder's.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.1; norms before each branch and after
    each half: Raffel et al. 2019, T5 (arXiv:1910.10683), section 2.1.
    """

    caps = Caps(
        reads=frozenset({CONDITIONS}),
        publishes=frozenset({MEMORIES + SOURCE}),
    )

    def __init__(self, encoder: Stack, decoder: Stack):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        inside = (m for m in self.modules() if isinstance(m, Layer) and m is not self)
        # Named fields that a layer of a half may ask for; none other is cached.
        self.fields_read = frozenset().union(*(layer.caps.reads for layer in inside))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that a path names."""
        return self.decoder.layers

    def stateful_parts(self) -> list[Stateful]:
        return [self.decoder]

    def initial_state(
        self, n: int, max_len: int, path: Sequence[int] | None = None
    ) -> State | None:
        return self.decoder.initial_state(n, max_len, path)

    def check_mask(self, mask: Mask) -> None:
        self.encoder.check_mask(Full())
        self.decoder.check_mask(mask)

    def forward(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None, path: Sequence[int] | None = None
    ) -> Out:
        state = None if state is None else state.commit()
        if state is not None and not torch.is_grad_enabled():
            if not ctx.layout.arrays().fresh.any():  # nothing to encode, such as a decoding step
                layout = _with_fields(ctx.layout, self.fields_read | ctx.mask.fields)
                return self.decoder(x_BTD, replace(ctx, layout=layout), state, path)
        parts = ctx.cached_on_host(
            "encoder_decoder.parts", lambda layout, mask: split(layout, self.fields_read, mask)
        )
        assert parts is not None
        source, target = parts
        encoded = self.encoder(
            source.take(x_BTD),
            _inside(replace(ctx, mask=Full(), draft=False), source),
        )
        memory = Memory(source.layout, Full(), encoded.y)
        inner = _inside(ctx, target)
        inner = replace(inner, memories={**ctx.memories, SOURCE: memory})
        out = self.decoder(target.take(x_BTD), inner, state, path)
        read = source.put(encoded.y)
        if not source.layout.arrays().length.any():  # gradients of its weights: zeros, not missing
            # ZeRO 3 has let go of those that it cut, and gives them zeros itself.
            whole = (p for p in self.encoder.parameters() if not hasattr(p, "ds_id"))
            read = read + zero_gradient_touch(whole, read)
        given = source.inside[..., None]
        join = lambda y: torch.where(given, read, target.put(y))
        assert out.ctx is not None
        found = {k: join(v) for k, v in out.ctx.published.items() if k.startswith(INTERMEDIATE)}
        after = replace(ctx, published={**ctx.published, **found})
        left = out.state
        if left is not None and ctx.draft:
            slots = next(left.leaves()).shape[0]
            left = DraftDecoder(left, PackedRows.of(source.layout, slots).slot_writes().length)
        return Out(join(out.y), left, after, {**encoded.aux, **out.aux})


def _inside(ctx: Ctx, part: Part) -> Ctx:
    """The context of a part of the call."""
    ids = None if ctx.ids is None else part.take(ctx.ids)
    return replace(ctx, layout=part.layout, ids=ids, published={})


def split(layout: Layout, names: frozenset[str], mask: Mask) -> tuple[Part, Part]:
    """The conditions that documents begin with, and all else; both as the host knows them.

    With the fields ``names``, and for the second those of ``mask``.
    """
    host = layout.on_host()
    marked = both_ways(host, Prefix(CONDITIONS))
    first = np.zeros(host.shape, bool) if marked is None else marked.numpy()
    return (
        split_off(_with_fields(layout, names), first),
        split_off(_with_fields(layout, names | mask.fields), ~first),
    )


def _with_fields(layout: Layout, names: frozenset[str]) -> Layout:
    """A layout with those of its named fields alone."""
    have = layout.fields.extra
    if have.keys() <= names:
        return layout
    kept = [name for name in have if name in names]
    return layout.map_fields(lambda f: f._replace(extra={n: f.extra[n] for n in kept}))


@BACKBONES.register("encoder_decoder")
class EncoderDecoderConfig(Config):
    """An encoder of the conditions, and a decoder of the rest that attends to its output."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    encodes: ClassVar[bool] = True  # conditions, each document's in one call
    encoder: StackConfig = Field(
        default_factory=lambda: StackConfig(pattern="attention", depth=4),
        description="the layers that read conditions both ways",
    )
    decoder: StackConfig = Field(
        default_factory=lambda: StackConfig(
            pattern="attention cross_attention", depth=8, ffns={"attention": None}
        ),
        description="the layers of all else; the word cross_attention attends to the encoder",
    )
    block: BlockField | None = Field(
        default=None, description="of both halves; default: each has its own"
    )
    recompute: Recompute = "none"

    small = {
        "encoder": {"pattern": "attention", "mixers": {"attention": {"heads": 2}}, "ffn": None},
        "decoder": {
            "pattern": "attention cross_attention",
            "mixers": {"attention": {"heads": 2}, "cross_attention": {"heads": 2}},
            "ffn": {"kind": "swiglu", "hidden": 8},
            "ffns": {"attention": None},
        },
    }

    def build(self, d_model: int, linear: LinearFactory = dense) -> EncoderDecoder:
        change: dict[str, Any] = {} if self.block is None else {"block": self.block}
        halves = []
        for half in (self.encoder, self.decoder):
            again = half.recompute if half.recompute != "none" else self.recompute
            halves.append(half.model_copy(update={**change, "recompute": again}))
        encoder, decoder = (half.build(d_model, linear) for half in halves)
        if SOURCE in memories_read(encoder):
            raise ValueError(f"encoder: a layer attends to '{SOURCE}', which the encoder makes")
        if SOURCE not in memories_read(decoder):
            raise ValueError(
                "decoder: no layer attends to the encoder's output: put cross_attention into its "
                "pattern"
            )
        return EncoderDecoder(encoder, decoder)
