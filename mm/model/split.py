"""Some positions of a packed call as a call of its own, in narrower rows.

B rows, T tokens, W columns of the part, M documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mm.layout import Layout, first_places
from mm.model.length_buckets import Regroup

STEP = 64  # columns: widths are rounded up, so that few shapes occur


@dataclass(frozen=True, slots=True)
class Part:
    """Positions of a call, at the start of their rows; documents keep numbers, slots and places."""

    layout: Layout  # (B, W)
    inside: Tensor  # (B, T) bool: which positions they are
    index: Tensor  # (B * W,) flat position of the call
    inverse: Tensor  # (B * T,) flat position of the part
    spare: Tensor  # (B * W,) bool: padding of the part

    def take(self, x_BT: Tensor) -> Tensor:
        """`(B, T, ...)` of the call to `(B, W, ...)`."""
        rows = Regroup.apply(_flat(x_BT), self.index, self.inverse, ~self.inside.flatten())
        return rows.view(*self.layout.shape, *x_BT.shape[2:])

    def put(self, y_BW: Tensor) -> Tensor:
        """`(B, W, ...)` to `(B, T, ...)`; what stands outside of the part has no meaning."""
        rows = Regroup.apply(_flat(y_BW), self.inverse, self.index, self.spare)
        return rows.view(*self.inside.shape, *y_BW.shape[2:])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], -1)


def split_off(layout: Layout, inside: np.ndarray) -> Part:
    """The positions ``inside`` `(B, T)` bool of a layout: computed on the host, asks no device."""
    host = layout.on_host()
    B, T = host.shape
    M = host.slot.shape[0]
    inside = inside & (host.fields.document.numpy() > 0)
    count = inside.sum(1)
    widest = max(1, int(count.max(initial=0)))
    W = min(T, -(-widest // STEP) * STEP)
    order = np.argsort(~inside, axis=1, kind="stable")[:, :W]
    index = order + T * np.arange(B)[:, None]
    valid = np.arange(W) < count[:, None]
    inverse = np.zeros(B * T, np.int64)
    inverse[index[valid]] = np.flatnonzero(valid.reshape(-1))
    at = torch.from_numpy(index)
    fields = host.fields.map(lambda t: t.flatten(0, 1)[at])
    document = fields.document * torch.from_numpy(valid)
    grids = {}
    for shape, cells in host.grids.items():
        cells = cells.numpy()
        whole = inside.reshape(-1)[cells].all(1)
        if whole.any():
            grids[shape] = torch.from_numpy(inverse[cells[whole]].astype(np.int32))
    longest = np.bincount(document.numpy().reshape(-1), minlength=M + 1)[1:].max(initial=0)
    part = replace(
        host,
        fields=fields._replace(document=document),
        cu_seqlens=first_places(document, M),
        max_seqlen=max(1, int(longest)),  # some layers do nothing with rows of no length
        grids=grids,
    )
    device = layout.fields.document.device
    move = lambda a: torch.from_numpy(a).to(device, non_blocking=True)  # noqa: E731
    return Part(
        part if layout.is_on_host else part.to(device),
        inside=move(inside),
        index=move(index.reshape(-1)),
        inverse=move(inverse),
        spare=move(~valid.reshape(-1)),
    )
