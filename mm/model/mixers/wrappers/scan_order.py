"""A causal mixer that reads the cells of grids in other orders.

B rows, T tokens, D model, G grids.

n axes of a grid.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal, Mask
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.wrappers.reverse import both_ways, refuse_state, reorder
from mm.registry import MIXERS, MixerField
from mm.state import State, join_parts, parts_of

Order = Literal["row", "column", "snake", "diagonal", "hilbert"]


@lru_cache(maxsize=256)
def order_of(order: Order, shape: tuple[int, ...]) -> np.ndarray:
    """`(cells,)` int64 raster number of the cell that is read first, second, ..

    ``row`` is the raster itself, ``column`` has the first axis run fastest, ``snake`` turns round
    at the end of every line, ``diagonal`` goes by the sum of coordinates, ``hilbert`` follows the
    curve of the smallest square of side 2^m that holds the last two axes, slice by slice.

    Source: row, column: Li et al. 2024, Mamba-ND (arXiv:2402.05892), section 3.2; Hilbert's curve:
    Hilbert 1891.
    """
    at = np.indices(shape).reshape(len(shape), -1)
    if order == "row":
        keys = list(at)
    elif order == "column":
        keys = list(at[::-1])
    elif order == "snake":
        keys = []
        for axis, size in zip(at, shape, strict=True):
            turned = sum(keys, np.zeros_like(axis)) % 2  # how many lines were read before this one
            keys.append(np.where(turned == 1, size - 1 - axis, axis))
    elif order == "diagonal":
        keys = [at.sum(0), *at]
    else:
        keys = [*at[:-2], _hilbert(at[-2], at[-1], max(shape[-2:]))]
    return np.lexsort(keys[::-1])


def _hilbert(row: np.ndarray, column: np.ndarray, side: int) -> np.ndarray:
    """How far along Hilbert's curve each cell lies."""
    y, x, far = row.copy(), column.copy(), np.zeros_like(row)
    half = (1 << max(side - 1, 0).bit_length()) // 2
    while half:
        right, below = (x & half) > 0, (y & half) > 0
        far += half * half * ((3 * right) ^ below)
        # The quadrants of the first row are the curve turned about a diagonal.
        mirror = ~below & right
        x, y = (
            np.where(mirror, half - 1 - (x & (half - 1)), x & (half - 1)),
            np.where(mirror, half - 1 - (y & (half - 1)), y & (half - 1)),
        )
        x, y = np.where(below, x, y), np.where(below, y, x)
        half //= 2
    return far


def read_order(layout: Layout, order: Order, reverse: bool, inside: Tensor) -> Tensor:
    """Flat indices `(B * T,)` that read the cells of grids in ``order`` and the rest in place.

    Only grids that are ``inside`` `(B, T)` are reordered.
    """
    index = torch.arange(inside.numel(), device=inside.device)
    for shape, cells in layout.grids.items():
        turn = torch.from_numpy(order_of(order, shape)).to(inside.device)
        cells = cells.to(inside.device).long()
        moved = cells[:, turn.flip(0) if reverse else turn]
        allowed = inside.flatten()[cells].all(1, keepdim=True)
        index = index.index_copy(0, cells.flatten(), torch.where(allowed, moved, cells).flatten())
    return index


def _again(mask: Mask, order: Order, reverse: bool, layout: Layout) -> tuple[Tensor, None]:
    inside = both_ways(layout, mask)
    assert inside is not None
    return read_order(layout, order, reverse, inside), None


def _tensors(ctx: Ctx) -> list[tuple[str, Tensor]]:
    return [(k, v) for k, v in ctx.published.items() if isinstance(v, Tensor)]


class ScanOrder(Mixer):
    """Permute the cells of each grid, run a causal mixer in that order, permute back.

    Several orders have a mixer each, and their outputs add up.

    Grids are those of `Layout.grids`: images and their like. Any order but the raster shows a token
    its future, so only cells move that see each other both ways: those of all grids under a full
    mask, of grids in the leading prefix of a document under `Prefix`. Under a causal mask a batch
    with grids is refused. Layers of a pattern may alternate orders.

    Source: Li et al. 2024, Mamba-ND (arXiv:2402.05892), section 3.2; four orders at once: Liu et
    al. 2024, VMamba (arXiv:2401.10166), its cross-scan.
    """

    def __init__(self, d_model: int, config: ScanOrderConfig, linear: LinearFactory):
        super().__init__()
        n, given = len(config.orders), config.reverse
        reverse = given if isinstance(given, tuple) else (given,) * n
        if len(reverse) != n:
            raise ValueError(f"scan_order: reverse has {len(reverse)} entries for {n} orders")
        self.orders, self.reverse = config.orders, reverse
        self.inners = nn.ModuleList(config.inner.build(d_model, linear) for _ in range(n))

    def check_mask(self, mask: Mask) -> None:
        super().check_mask(Causal())

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        super().prefetch(replace(ctx, mask=Causal()), serving)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        refuse_state("scan_order", ctx, state)
        inside = both_ways(ctx.layout, ctx.mask)
        raster = all(o == "row" and not r for o, r in zip(self.orders, self.reverse, strict=True))
        if inside is None and ctx.layout.grids and not raster:
            raise UserError(
                f"scan_order: {', '.join(self.orders)} shows cells of a grid their future and "
                f"needs `mask: full` or a prefix, not {type(ctx.mask).__name__}; for a causal "
                "model set orders: [row]"
            )
        parts = parts_of(state, len(self.inners))
        ys, states, aux = [], [], {}
        causal = replace(ctx, mask=Causal())
        for i, (inner, order) in enumerate(zip(self.inners, self.orders, strict=True)):
            old = parts[i]
            if inside is None or not ctx.layout.grids:
                out = inner(x_BTD, causal, old)
            else:
                index = read_order(ctx.layout, order, self.reverse[i], inside)
                again = partial(_again, ctx.mask, order, self.reverse[i])
                # The mixer's time is the order itself.
                inside_order = ctx.derive(index, again=again, mask=Causal(), time="stays")
                # What was published of a token goes with it, there and back.
                there = {k: reorder(v, index) for k, v in _tensors(causal)}
                inside_order = replace(inside_order, published=there)
                out = inner(reorder(x_BTD, index), inside_order, old)
                back = torch.empty_like(index).scatter_(
                    0, index, torch.arange(len(index), device=index.device)
                )
                made = _tensors(out.ctx or inside_order)
                new = {k: reorder(v, back) for k, v in made if k not in there}
                after = replace(causal, published={**causal.published, **new})
                out = out._replace(y=reorder(out.y, back), ctx=after)
            causal = causal.hand_on(out.ctx) or causal
            ys.append(out.y)
            states.append(out.state)
            aux |= out.aux
        return Out(sum(ys[1:], ys[0]), join_parts(*states), ctx.hand_on(causal), aux)


@MIXERS.register("scan_order")
class ScanOrderConfig(LayerConfig):
    """A mixer over the cells of a grid, in one order or several."""

    kind: Literal["scan_order"] = "scan_order"
    inner: MixerField = Field(default="mamba", validate_default=True)
    orders: tuple[Order, ...] = Field(
        default=("row",), min_length=1, description="each with a mixer of its own"
    )
    reverse: tuple[bool, ...] | bool = Field(
        default=False, description="from the last cell; one, or one for each order"
    )

    layer = ScanOrder
    small = {
        "inner": {"kind": "gated_scan", "width": 6},
        "orders": ("snake", "column"),
        "reverse": (False, True),
    }
