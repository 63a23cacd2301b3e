"""pLSTM's gating matrix in log steps: blocks of a grid merge pairwise.

B grids, I block rows, J block columns; a block has y rows, x columns, E = y + x edges in (left,
then top) and out (right, then bottom).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Blocks(NamedTuple):
    """What blocks do to what crosses them."""

    through: Tensor  # (B, I, J, E out, E in)
    source: Tensor  # (B, I, J, E out, y, x): from a cell to an edge out
    mark: Tensor  # (B, I, J, y, x, E in): from an edge in to a cell
    inside: Tensor  # (B, I, J, y, x, y, x): reader, then source

    def transpose(self) -> Blocks:
        """Rows as columns."""
        y = self.inside.shape[3]
        swap = lambda t, dim: torch.cat(
            (t.narrow(dim, y, t.shape[dim] - y), t.narrow(dim, 0, y)), dim
        )
        return Blocks(
            swap(swap(self.through, 3), 4).transpose(1, 2),
            swap(self.source, 3).transpose(1, 2).transpose(4, 5),
            swap(self.mark, 5).transpose(1, 2).transpose(3, 4),
            self.inside.transpose(1, 2).transpose(3, 4).transpose(5, 6),
        )

    def merge_right(self) -> Blocks:
        """Each block with its right neighbour as one."""
        y = self.inside.shape[3]
        a, b = (Blocks(*(t[:, :, i::2] for t in self)) for i in (0, 1))
        # What leaves the left block to the right enters the right one.
        crossing, put = a.through[..., :y, :], a.source[..., :y, :, :]
        enters, seen = b.through[..., :y], b.mark[..., :y]
        on = lambda m, t: torch.einsum("...oy,...yi->...oi", m, t)
        put_on = torch.einsum("...oe,...eyx->...oyx", enters, put)
        none = torch.zeros_like
        through = torch.cat((on(enters, crossing), b.through[..., y:]), -1)
        down_a = torch.cat((a.through[..., y:, :], none(b.through[..., y:, y:])), -1)
        source = torch.cat((put_on, b.source), -1)
        source_a = torch.cat((a.source[..., y:, :, :], none(b.source[..., y:, :, :])), -1)
        mark = torch.cat(
            (torch.einsum("...yxe,...ei->...yxi", seen, crossing), b.mark[..., y:]), -1
        )
        mark_a = torch.cat((a.mark, none(b.mark[..., y:])), -1)
        reached = torch.einsum("...yxe,...euv->...yxuv", seen, put)
        return Blocks(
            torch.cat((through[..., :y, :], down_a, through[..., y:, :]), -2),
            torch.cat((source[..., :y, :, :], source_a, source[..., y:, :, :]), -3),
            torch.cat((mark_a, mark), -2),
            torch.cat(
                (
                    torch.cat((a.inside, none(reached)), -1),
                    torch.cat((reached, b.inside), -1),
                ),
                -3,
            ),
        )


def gating_in_blocks(source: Tensor, through: Tensor, mark: Tensor) -> Tensor:
    """`gating`, `(B, Y, X, Y X)`, in ``log2 X + log2 Y`` merges of blocks.

    How much of what each cell puts into the grid each cell reads, over all paths that go right and
    down.

    Args:
        source: `(B, Y, X, 2)` to the right and down.
        through: `(B, Y, X, 2, 2)` edge out (right, down), edge in (left, above).
        mark: `(B, Y, X, 2)` from the left and from above.
    Source: Pöppel et al. 2025, pLSTM (arXiv:2506.11997), its parallelization on 2D grids.
    """
    B, Y, X = mark.shape[:3]
    wide, high = 1 << (X - 1).bit_length(), 1 << (Y - 1).bit_length()
    # Cells past the end have no gates: nothing comes from them.
    filled = [
        F.pad(t, (0, 0) * (t.dim() - 3) + (0, wide - X, 0, high - Y))
        for t in (through, source, mark)
    ]
    blocks = Blocks(
        filled[0],
        filled[1][..., None, None],
        filled[2][:, :, :, None, None],
        filled[2].new_zeros(B, high, wide, 1, 1, 1, 1),
    )
    while blocks.inside.shape[2] > 1 or blocks.inside.shape[1] > 1:
        if blocks.inside.shape[2] > 1:
            blocks = blocks.merge_right()
        if blocks.inside.shape[1] > 1:
            blocks = blocks.transpose().merge_right().transpose()
    return blocks.inside[:, 0, 0, :Y, :X, :Y, :X].flatten(3)
