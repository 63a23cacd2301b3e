"""What the law tests share: every registered layer, and ways to feed it documents.

B rows, T tokens, D model, N slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mm
from mm.layout import Doc, Layout
from mm.mask import Causal, Full, Mask
from mm.model.backbones.stack import StackConfig, presets
from mm.model.context import Ctx, Memory
from mm.model.layer import Layer, Out, init_weights
from mm.model.memories import memories_read
from mm.registry import (
    BACKBONES,
    BLOCKS,
    FFNS,
    LINEARS,
    MIXERS,
    POSITIONS,
)
from mm.specs import TokenSpec
from mm.state import State
from mm.vocabulary import Vocabulary

D = 16
MAX_LEN = 16
TOL = {"rtol": 1e-9, "atol": 1e-10}
ROOT = Path(mm.__file__).parent.parent
VOCABULARY = (
    Vocabulary().add(TokenSpec("text", 11)).add(TokenSpec("image", 7)).add(TokenSpec("audio", 5, 2))
)


def variants() -> dict[str, Callable[[], Layer]]:
    """Every registered layer in its smallest form, every preset, and further settings.

    The settings take other paths through the code.
    """
    made: dict[str, Callable[[], Layer]] = {}
    for kind in MIXERS:
        made[f"mixer:{kind}"] = lambda kind=kind: MIXERS.get(kind).smallest().build(D)
    for word in presets():
        made[f"preset:{word}"] = lambda word=word: StackConfig(pattern=word).mixer(word).build(D)
    for kind in POSITIONS:
        made[f"position:{kind}"] = lambda kind=kind: MIXERS.get("attention")(
            heads=2, position=kind
        ).build(D)
    for kind in LINEARS:
        made[f"linear:{kind}"] = lambda kind=kind: MIXERS.get("attention")(heads=2).build(
            D, LINEARS.get(kind).smallest().build
        )
    for kind in FFNS:
        made[f"ffn:{kind}"] = lambda kind=kind: FFNS.get(kind).smallest().build(D)
    mixer, ffn = MIXERS.get("attention").smallest(), FFNS.get("swiglu")(hidden=8)
    for kind in BLOCKS:
        made[f"block:{kind}"] = lambda kind=kind: (
            BLOCKS.get(kind).smallest().build(D, mixer.build(D), ffn.build(D))
        )
    for kind in BACKBONES:
        made[f"backbone:{kind}"] = lambda kind=kind: BACKBONES.get(kind).smallest().build(D)
    attention, rg_lru = MIXERS.get("attention"), MIXERS.get("rg_lru")
    made["attention, ring of 3"] = lambda: attention(heads=2, kv_heads=1, window=3).build(D)
    made["attention, ring of 1"] = lambda: attention(heads=2, window=1).build(D)
    made["attention, no QK-norm, wide heads"] = lambda: attention(
        heads=2, head_dim=6, qk_norm=False
    ).build(D)
    made["attention, output gate, half rotated"] = lambda: attention(
        heads=2, gate=True, position={"kind": "rope", "fraction": 0.5}
    ).build(D)
    made["block, post-norms, GEGLU"] = lambda: BLOCKS.get("prenorm")(post_norms=True).build(
        D, mixer.build(D), FFNS.get("swiglu")(hidden=8, activation="gelu_tanh").build(D)
    )
    made["rg_lru, other width and conv_size"] = lambda: rg_lru(
        width=12, heads=3, conv_size=2
    ).build(D)
    made["rg_lru, first token unscaled"] = lambda: rg_lru(heads=2, first_unscaled=True).build(D)
    made["mamba, no bias of the convolution"] = lambda: MIXERS.get("mamba")(
        expand=1, states=3, conv_bias=False
    ).build(D)
    made["linear_attention, norm by key head"] = lambda: MIXERS.get("linear_attention")(
        heads=4, key_heads=2, feature="silu", normalise=False, decay="step", norm="key_head",
        norm_eps=1e-3, conv_size=3, conv_bias=False, gate="silu", gate_first=True,
    ).build(D)  # fmt: skip
    made["delta_rule, shared keys"] = lambda: MIXERS.get("delta_rule")(
        heads=4, key_heads=2, key_dim=3, gate="scalar", output_gate=True, norm_eps=1e-3
    ).build(D)
    made["moe, gated shared expert"] = lambda: FFNS.get("moe")(
        experts=4, hidden=8, shared=1, shared_gate=True
    ).build(D)
    made["stack, recomputed hybrid"] = lambda: StackConfig(
        depth=3,
        pattern="rg_lru local_attention",
        recompute="full",
        ffn={"kind": "swiglu", "hidden": 8},
        mixers={"local_attention": {"heads": 2, "window": 3}, "rg_lru": {"heads": 2}},
    ).build(D)
    made["stack, words with a block of their own"] = lambda: StackConfig(
        pattern="rg_lru attention",
        ffn={"kind": "swiglu", "hidden": 8},
        block={"kind": "prenorm", "normed_residual": True, "norm": "layer"},
        norm="layer",
        blocks={"attention": {"kind": "prenorm", "pre_norms": False, "post_norms": True}},
        mixers={"attention": {"heads": 2}, "rg_lru": {"heads": 2}},
    ).build(D)
    return made


VARIANTS = variants()
layers = pytest.mark.parametrize("name", VARIANTS)


def build(name: str, dtype: torch.dtype = torch.float64) -> Layer:
    """The layer in training mode, no parameter at its special initial value (zeros, ones)."""
    torch.default_generator.manual_seed(7)  # torch.manual_seed asks every kind of device
    layer = VARIANTS[name]()
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if not layer.caps.step:  # it refuses to make a State: laws about States say nothing of it
        layer.initial_state = lambda n, max_len: pytest.skip("this layer has no State")
    return layer.to(dtype)


def mask_of(layer: Layer) -> Mask:
    """The mask that a layer (or the mixer of a block) is made for."""
    return Causal() if getattr(layer, "mixer", layer).caps.causal else Full()


def apply(layer: Layer, x: Tensor, layout: Layout, state: State | None = None, **ctx: Any) -> Out:
    return layer(x, context(layer, x, layout, **ctx), state)


def context(layer: Layer, x: Tensor, layout: Layout, **ctx: Any) -> Ctx:
    """What a layer is told: the mask that it is made for, ids, the fields and memories it reads."""
    # Mixers that look at tokens need some: the same for the same vector, few, so that they recur.
    ctx.setdefault("ids", (x[..., :1].detach() > 0).int())
    if "prefix" in layer.caps.reads:  # one token, which no chunk cuts
        first = lambda f: (f.position[..., 0] == 0).int()
        layout = layout.map_fields(lambda f: f._replace(extra={"prefix": first(f)}))
    names = memories_read(layer)
    if names and "memories" not in ctx:
        ctx["memories"] = {name: memory(x.detach(), layout) for name in names}
    return Ctx(layout, ctx.pop("mask", mask_of(layer)), **ctx)


def memory(x: Tensor, layout: Layout) -> Memory:
    """Two or three vectors for each document that begins, which its first token names."""
    found, lengths = [], []
    known = layout.arrays()
    g = torch.Generator().manual_seed(3)
    base = torch.randn(3, x.shape[-1], dtype=torch.float64, generator=g).to(x)
    flat = x.flatten(0, 1)
    for start, length, fresh in zip(known.start, known.length, known.fresh, strict=True):
        many = start % 2 if flat.device.type != "cpu" else 0 < flat[start, 0] < torch.inf
        lengths.append(2 + bool(many) if fresh and length else 0)
        found.append(base[: lengths[-1]] + (flat[start] if length else 0))
    M = len(lengths)
    host = layout.on_host()
    rows = [
        [Doc(n, slot=int(host.slot[i]), fresh=bool(host.fresh[i])) for i, n in enumerate(lengths)]
    ]
    own = Layout.from_rows(rows, sum(lengths) + 1, M)
    filled = torch.cat([*found, base.new_full((1, base.shape[-1]), 1e3)])[None]
    return Memory(own.to(x.device), Full(), filled)


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, dtype=torch.float64, generator=g) for n in lengths]


def alone(layer: Layer, x_TD: Tensor) -> Tensor:
    """What the layer makes of one whole document in a call of its own.

    The meaning that all other ways must match.
    """
    return apply(layer, x_TD[None], Layout.plain(1, len(x_TD))).y[0]


Chunk = tuple[int, Tensor, int]  # slot, tokens, how many of its document came before


def packed(rows: list[list[Chunk]], pad: int = 0, **doc: Any) -> tuple[Tensor, Layout]:
    """Lay chunks of several slots out in rows, each row padded to the longest and by ``pad``.

    Padding holds large numbers.
    """
    T = max(sum(len(x) for _, x, _ in row) for row in rows) + pad
    layout = Layout.from_rows(
        [
            [
                Doc(len(x), slot=slot, fresh=doc.get("fresh", before == 0), start=before)
                for slot, x, before in row
            ]
            for row in rows
        ],
        T,
    )
    x = torch.full((len(rows), T, D), 1e3, dtype=torch.float64)
    for b, row in enumerate(rows):
        at = 0
        for _, tokens, _ in row:
            x[b, at : at + len(tokens)] = tokens
            at += len(tokens)
    return x, layout


def unpacked(y: Tensor, rows: list[list[Chunk]]) -> Iterator[tuple[int, Tensor]]:
    for b, row in enumerate(rows):
        at = 0
        for slot, tokens, _ in row:
            yield slot, y[b, at : at + len(tokens)]
            at += len(tokens)


def serve(
    layer: Layer,
    docs: list[Tensor],
    plan: list[list[list[tuple[int, int]]]],
    state: State | None,
    pad: int = 1,
) -> list[Tensor]:
    """Feed documents by a plan of calls, of rows, of (slot, number of tokens).

    Document i is in slot i; returns all outputs.
    """
    done = [0] * len(docs)
    outs: list[list[Tensor]] = [[] for _ in docs]
    for call in plan:
        rows: list[list[Chunk]] = []
        for row in call:
            rows.append([])
            for slot, n in row:
                rows[-1].append((slot, docs[slot][done[slot] : done[slot] + n], done[slot]))
                done[slot] += n
        x, layout = packed(rows, pad)
        out = apply(layer, x, layout, state)
        state = out.state
        for slot, y in unpacked(out.y, rows):
            outs[slot].append(y)
    assert done == [len(d) for d in docs], "the plan must feed every document to its end"
    return [torch.cat(parts) for parts in outs]


LENGTHS = (7, 5, 1, 9)
PLANS: dict[str, list[list[list[tuple[int, int]]]]] = {
    "whole documents, two a row": [[[(0, 7), (1, 5)], [(2, 1), (3, 9)]]],
    "chunks of unlike progress": [
        [[(0, 3)], [(3, 4), (1, 1)]],
        [[(1, 2), (0, 1), (3, 1)]],
        [[(2, 1), (0, 3)], [(1, 2)], [(3, 4)]],
    ],
    "prefill beside single tokens": [
        [[(0, 6), (3, 1)]],
        [[(3, 7), (0, 1), (1, 1)]],
        [[(2, 1), (3, 1), (1, 4)]],
    ],
    "one document after another": [[[(0, 7)]], [[(1, 5)]], [[(2, 1)]], [[(3, 2)]], [[(3, 7)]]],
    "steps in aligned rows": [
        [[(0, 1)], [(1, 1)], [(2, 1)], [(3, 1)]],
        *[[[(0, 1)], [(1, 1)], [(2, 0)], [(3, 1)]]] * 4,
        *[[[(0, 1)], [(1, 0)], [(2, 0)], [(3, 1)]]] * 2,
        *[[[(0, 0)], [(1, 0)], [(2, 0)], [(3, 1)]]] * 2,
    ],
    "aligned ragged prefill, then steps": [
        [[(0, 6)], [(1, 2)], [(2, 1)], [(3, 8)]],
        [[(0, 1)], [(1, 1)], [(2, 0)], [(3, 1)]],
        *[[[(0, 0)], [(1, 1)], [(2, 0)], [(3, 0)]]] * 2,
    ],
}
