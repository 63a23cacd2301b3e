"""Mixers over the cells of a grid, against loops over cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import TOL, D
from torch import Tensor

from mm.kernels.linear_scan import linear_scan
from mm.layout import Layout
from mm.mask import Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.ssm.plstm import Gates, gating
from mm.registry import MIXERS


def build(kind: str, **settings: Any) -> Any:
    torch.manual_seed(4)
    layer = MIXERS.get(kind)(**settings).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image(Y: int, X: int, before: int = 0, after: int = 0) -> Layout:
    """One document: ``before`` words, a grid, ``after`` words."""
    layout = Layout.plain(1, before + Y * X + after)
    return replace(layout, grids={(Y, X): before + torch.arange(Y * X)[None]})


# ---- pLSTM ----


def looped(layer: Any, x: Tensor, Y: int, X: int) -> Tensor:
    """Two matrices a cell, cell after cell, in each of four directions: `(N, D)`."""
    N, H, K = Y * X, layer.heads, layer.head_dim
    q, k, v = (x @ layer.qkv.weight.T).view(N, 3, H, K).unbind(1)
    raw = (x @ layer.gate.weight.T).view(N, -1, H) + layer.gate_bias
    around, direct = raw.sigmoid()[:, :-1].view(N, layer.gates, 4, H), raw.sigmoid()[:, -1]
    y = direct[..., None] * (q * k).sum(-1, keepdim=True) * v
    for way in range(4):
        columns = range(X)[::-1] if way & 1 else range(X)
        rows = range(Y)[::-1] if way & 2 else range(Y)
        right, down = {}, {}
        zero = x.new_zeros(H, K, K)
        for a, r in enumerate(rows):
            for b, c in enumerate(columns):
                n = r * X + c
                kv = k[n][:, :, None] * v[n][:, None]
                g = [t[:, None, None] for t in around[n, :, way]]
                left, above = right.get((a, b - 1), zero), down.get((a - 1, b), zero)
                if layer.mode == "propagation":
                    share, keep, source, mark = g
                    read = mark * (left + above)
                    right[a, b] = share * (keep * (left + above) + source * kv)
                    down[a, b] = (1 - share) * (keep * (left + above) + source * kv)
                else:
                    s_right, s_down, across, turn, through, m_left, m_above = g
                    read = m_left * left + m_above * above
                    right[a, b] = across * left + turn * above + s_right * kv
                    down[a, b] = through * above + s_down * kv
                y[n] = y[n] + torch.einsum("hk,hkv->hv", q[n], read)
    y = y * K**-0.5
    return layer.norm(y).flatten(1) @ layer.out.weight.T


@pytest.mark.parametrize("mode", ["propagation", "diffusion"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 2), (1, 6)])
def test_plstm_is_the_loop_over_cells(mode: str, shape: tuple[int, int]) -> None:
    layer, (Y, X) = build("plstm", heads=2, mode=mode), shape
    x = drawn(Y * X + 3, D).requires_grad_()
    out = layer(x[None], Ctx(image(Y, X, 1, 2), Full())).y[0]
    cells = slice(1, 1 + Y * X)
    expected = looped(layer, x.detach()[cells].clone().requires_grad_(), Y, X)
    torch.testing.assert_close(out[cells], expected, **TOL)
    # The words around the grid are a line: the grid is not there for them.
    words = torch.cat((x[:1], x[1 + Y * X :]))
    torch.testing.assert_close(
        torch.cat((out[:1], out[1 + Y * X :])), looped(layer, words, 1, 3), **TOL
    )
    w = drawn(*expected.shape, seed=1)
    ours = torch.autograd.grad((out[cells] * w).sum(), [x, *layer.parameters()])
    y = looped(layer, x[cells], Y, X)
    theirs = torch.autograd.grad((y * w).sum(), [x, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_what_plstm_propagates_neither_grows_nor_vanishes_along_its_direction() -> None:
    """Transitions that keep everything.

    A cell's whole strength crosses every diagonal, in diffusion it reaches every cell, by one path
    each.
    """
    n, share = 12, torch.full((1, 12, 12), 0.8, dtype=torch.float64)
    one = torch.ones_like(share)
    out, rest = share, 1 - share
    read = gating(Gates(out, rest, out, out, rest, rest, one, one))[0, :, :, 0]
    by_diagonal = [sum(read[i, d - i] for i in range(d + 1)) for d in range(n)]
    torch.testing.assert_close(torch.stack(by_diagonal[1:]), one[0, 0, : n - 1])
    spread = gating(Gates(one, one, one, one, None, one, one, one))[0, :, :, 0]
    torch.testing.assert_close(spread.flatten()[1:], one.flatten()[1:])


def gating_by_rows(g: Gates) -> Tensor:
    """`gating` as it is defined: a scan a row, rows one after another."""
    B, Y, X = g.mark_left.shape
    cells = torch.eye(Y * X, dtype=g.mark_left.dtype, device=g.mark_left.device).view(Y, X, -1)
    wide = lambda t: t[..., None]
    g = g._replace(left_down=torch.zeros_like(g.mark_left) if g.left_down is None else g.left_down)
    above, read = cells.new_zeros(B, X, Y * X), []
    rows = zip(*(wide(t).unbind(1) for t in g), cells.unbind(0), strict=True)
    for s_right, s_down, across, turn_right, turn_down, through, m_left, m_above, own in rows:
        into = turn_right * above + s_right * own
        right, _ = linear_scan(across.expand_as(into), into)
        left = torch.nn.functional.pad(right[:, :-1], (0, 0, 1, 0))
        read.append(m_left * left + m_above * above)
        above = turn_down * left + through * above + s_down * own
    return torch.stack(read, 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (2, 2), (3, 5), (8, 4), (7, 9)])
@pytest.mark.parametrize("turning", [True, False])
def test_log_steps_equal_rows_one_after_another(shape: tuple[int, int], turning: bool) -> None:
    drawn_ = [drawn(2, *shape, seed=i).sigmoid().requires_grad_() for i in range(8)]
    gates = Gates(*drawn_)
    if not turning:
        gates, drawn_ = gates._replace(left_down=None), drawn_[:4] + drawn_[5:]
    w = drawn(2, *shape, shape[0] * shape[1], seed=9)
    found = []
    for run in (gating, gating_by_rows):
        y = run(gates)
        grads = torch.autograd.grad((y * w).sum() + 0 * sum(g.sum() for g in drawn_), drawn_)
        found.append((y, *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- PEG ----


def test_peg_is_a_depthwise_convolution_with_zeros_around_the_grid() -> None:
    layer, (Y, X) = build("peg"), (4, 5)
    x = drawn(Y * X + 3, D).requires_grad_()
    y = layer(x[None], Ctx(image(Y, X, 2, 1), Full())).y[0]
    middle = layer.bias + layer.weight[1, 1] * x[-1]
    torch.testing.assert_close(y[-1], middle, **TOL)  # the grid is zeros to the words around it
    cells = x[2:-1].view(Y, X, D)
    for r in range(Y):
        for c in range(X):
            seen = layer.bias + sum(
                layer.weight[i + 1, j + 1] * cells[r + i, c + j]
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
                if 0 <= r + i < Y and 0 <= c + j < X
            )
            torch.testing.assert_close(y[2 + r * X + c], seen, **TOL)
    even = layer(torch.ones_like(x)[None], Ctx(image(Y, X, 2, 1), Full())).y[0, 2:-1].view(Y, X, D)
    torch.testing.assert_close(even[1:-1, 1:-1], even[1:2, 1:2].expand(Y - 2, X - 2, D))
    assert (even[0, 0] - even[1, 1]).abs().max() > 1e-3, "a border tells where a cell is"
