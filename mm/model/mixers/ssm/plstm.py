"""Linear recurrence over the cells of a grid.

G grids of Y rows and X columns, N = Y X cells, B rows, T tokens, D model, H heads, K head width, R
rows of one document, L tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.encoder_only.base import valid_of
from mm.model.mixers.encoder_only.grid import GridMixer
from mm.model.mixers.ssm.plstm_blocks import gating_in_blocks
from mm.model.norm import RMSNorm
from mm.registry import MIXERS


class Gates(NamedTuple):
    """Gates of every cell, `(B, Y, X)` each.

    A cell has edges in from its left and from above, edges out to its right and downwards.
    """

    source_right: Tensor
    source_down: Tensor
    left_right: Tensor  # transitions: edge in, edge out
    above_right: Tensor
    left_down: Tensor | None  # None = nothing: no path turns from right to down
    above_down: Tensor
    mark_left: Tensor
    mark_above: Tensor


def _before(x: Tensor, dim: int) -> Tensor:
    """What the edge out of the neighbour before holds; zeros at the border."""
    x = x.movedim(dim, 1)
    return F.pad(x[:, :-1].movedim(1, -1), (1, 0)).movedim(-1, dim)


def gating(g: Gates) -> Tensor:
    """How much of what each cell puts into the grid each cell reads: `(B, Y, X, N)`.

    Over all paths that go right and down.

    ``right = left_right * left + above_right * above + source_right`` and so ``down``, where left
    and above are the edges out of the neighbours; read are ``mark_left * left + mark_above *
    above``. Without ``left_down`` two scans do; else blocks of cells merge in log steps.

    Source: Pöppel et al. 2025, pLSTM (arXiv:2506.11997): source, transition and mark gates, on
    2D grids.
    """
    if g.left_down is not None:
        right = torch.stack((g.left_right, g.above_right), -1)
        down = torch.stack((g.left_down, g.above_down), -1)
        return gating_in_blocks(
            torch.stack((g.source_right, g.source_down), -1),
            torch.stack((right, down), -2),
            torch.stack((g.mark_left, g.mark_above), -1),
        )
    B, Y, X = g.mark_left.shape
    cells = torch.eye(Y * X, dtype=g.mark_left.dtype, device=g.mark_left.device).view(Y, X, -1)
    wide = lambda t: t[..., None]
    spread = lambda t: wide(t).expand(B, Y, X, Y * X)
    turned = lambda t: t.transpose(1, 2).flatten(0, 1)  # columns are rows
    down, _ = linear_scan(turned(spread(g.above_down)), turned(wide(g.source_down) * cells))
    above = _before(down.view(B, X, Y, -1).transpose(1, 2), 1)
    into = wide(g.above_right) * above + wide(g.source_right) * cells
    right, _ = linear_scan(spread(g.left_right).flatten(0, 1), into.flatten(0, 1))
    left = _before(right.view(B, Y, X, -1), 2)
    return wide(g.mark_left) * left + wide(g.mark_above) * above


class PLSTM(GridMixer):
    """``y_i = sum_j G_ij (q_i . k_j) v_j`` with a matrix G of gated paths through a grid.

    G sums, over the four directions of a grid, the products of gates along every path from cell j
    to cell i (`gating`).

    Propagation (P): what enters a cell leaves in shares ``t a`` to the right and ``t (1 - a)``
    downwards, so nothing grows and some direction keeps its strength. Diffusion (D): paths go
    down, then right, all gates are free. Cells are those of `Layout.grids`; the other positions of
    a document are one line, in the order of time. G is built in log steps.

    Source: Pöppel et al. 2025 (arXiv:2506.11997), its P-mode and D-mode.
    """

    def __init__(self, d_model: int, config: PLSTMConfig, linear: LinearFactory):
        super().__init__()
        heads, mode = config.heads, config.mode
        self.heads, self.head_dim, self.mode = heads, d_model // heads, mode
        self.gates = 4 if mode == "propagation" else 7
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.gate = linear(d_model, heads * (4 * self.gates + 1), "gate")
        self.gate_bias = nn.Parameter(torch.empty(4 * self.gates + 1, heads))  # last: direct
        self.norm = RMSNorm(self.head_dim)
        self.out = linear(d_model, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.gate_bias)
        with torch.no_grad():
            by_gate = self.gate_bias[:-1].view(self.gates, 4, self.heads)
            if self.mode == "propagation":
                by_gate[0] = torch.linspace(-2, 2, self.heads)  # heads look different ways
                by_gate[1] = 3.0  # what enters leaves
            else:
                by_gate[2:5] = 3.0

    def mix_grid(self, cells_GND: Tensor, Y: int, X: int, ctx: Ctx) -> Tensor:
        return self._mixed(cells_GND, Y, X, None, None, ctx)

    def mix_line(self, x_RLD: Tensor, length_R: Tensor, passed_RL: Tensor, ctx: Ctx) -> Tensor:
        L = x_RLD.shape[1]
        return self._mixed(x_RLD, 1, L, valid_of(length_R, L) & ~passed_RL, passed_RL, ctx)

    def _mixed(
        self, x: Tensor, Y: int, X: int, real: Tensor | None, passed: Tensor | None, ctx: Ctx
    ) -> Tensor:
        """Outputs `(G, N, D)` of grids.

        ``real`` `(G, N)`: cells that put something in; ``passed``: those that a line runs through
        as if they were not there.
        """
        (G, N), H = x.shape[:2], self.heads
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.qkv(x, ctx).to(wide).view(G, N, 3, H, self.head_dim).unbind(2)
        raw = self.gate(x, ctx).to(wide).view(G, N, -1, H) + self.gate_bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            *around, direct = raw.sigmoid().unbind(2)
            # (gates, 4 directions, G, H, Y, X)
            each = torch.stack(around).view(self.gates, 4, G, Y, X, H).movedim(-1, 3)
            gates = self._gates(each, real, passed, (G, H, Y, X))
            flat = {n: t.flatten(0, 2) for n, t in gates._asdict().items() if t is not None}
            share = gating(gates._replace(**flat))
            share = share.view(4, G * H, Y, X, Y, X)
            total = sum(
                _flipped(s, way, (1, 3), (2, 4)) for way, s in enumerate(share.unbind(0))
            ) + direct.transpose(1, 2).reshape(G * H, N).diag_embed().view(G * H, Y, X, Y, X)
            scores = torch.einsum("gihk,gjhk->ghij", q, k) * self.head_dim**-0.5
            y = torch.einsum("ghij,gjhk->gihk", scores * total.reshape(G, H, N, N), v)
        return self.out(self.norm(y).flatten(2).to(x.dtype), ctx)

    def _gates(
        self,
        each: Tensor,
        real: Tensor | None,
        passed: Tensor | None,
        shape: tuple[int, int, int, int],
    ) -> Gates:
        """Gates `(4, G, H, Y, X)`, each direction as right and down."""
        G, _, Y, X = shape
        put: Tensor | float = 1.0 if real is None else real.view(G, 1, Y, X).to(each)
        if self.mode == "propagation":
            share, keep, source, mark = each.unbind(0)
            to_right, to_down = keep * share, keep * (1 - share)
            made = [source * share * put, source * (1 - share) * put]
            made += [to_right, to_right, to_down, to_down, mark, mark]
        else:
            s_right, s_down, across, turn, through, m_left, m_above = each.unbind(0)
            made = [s_right * put, s_down * put, across, turn, through, m_left, m_above]
        if passed is not None:
            here = passed.view(G, 1, Y, X)
            made[2] = made[2].masked_fill(here, 1.0)
        seen = [
            torch.stack([_flipped(t, way, (2,), (3,)) for way, t in enumerate(gate.unbind(0))])
            for gate in made
        ]
        left_down = seen.pop(4) if self.mode == "propagation" else None
        s_right, s_down, across, turn, through, m_left, m_above = seen
        return Gates(s_right, s_down, across, turn, left_down, through, m_left, m_above)


def _flipped(t: Tensor, way: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """``t`` as direction ``way`` sees it: bit 0 from the right, bit 1 from below."""
    dims = (columns if way & 1 else ()) + (rows if way & 2 else ())
    return t.flip(dims) if dims else t


@MIXERS.register("plstm")
class PLSTMConfig(EvenHeadsConfig):
    """Linear recurrence over grids in four directions; bidirectional."""

    kind: Literal["plstm"] = "plstm"
    mode: Literal["propagation", "diffusion"] = Field(
        default="propagation",
        description="propagation: directed, far; diffusion: both ways out, decaying",
    )

    layer = PLSTM
