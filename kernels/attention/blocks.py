"""Attention a tile of queries and keys at a time, in plain PyTorch.

Matrix products, an online softmax, a backward written by hand, no `(T, S)` tensor. Vectors say of a
tile what hides keys and changes scores.

N = rows times key heads, M query heads of a key head, a tile has C queries and E keys.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec, ScoreSpec

QUERIES, KEYS = 128, 1024
IN_HAND = 1 << 18  # scores held at once: what a core's cache holds
# Devices whose values say which tiles need no scores or no mask. Others would have to wait for
# every answer; there the masks themselves hide all of such a tile.
ASKED = ("cpu",)


@dataclass(frozen=True)
class _Tile:
    """Rows r0..r1 and key heads g0..g1 (n0..n1 flat), queries a..b, keys c..d."""

    r: slice
    g: slice
    n: slice
    t: slice
    s: slice
    hidden: list[tuple[slice, Tensor]]  # columns of the tile, `(R or 1, C, columns)` bool


class _Tiles:
    """Operands by head, `(N, ., .)`, in float32 or wider, and the walk over tiles of scores."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec):
        self.mask, self.score = mask, score
        self.wide = torch.promote_types(v.dtype, torch.float32)
        self.R, self.T, self.H, self.K = q.shape
        self.S, self.G, self.V = k.shape[1], k.shape[2], v.shape[-1]
        self.M = self.H // self.G
        self.asks = q.device.type in ASKED
        self.scale = score.factor(self.K)
        self.q = self.by_head(q) * self.scale  # (N, M, T, K)
        self.k = self.by_head(k)[:, 0]  # (N, S, K)
        self.v = self.by_head(v)[:, 0]  # (N, S, V)
        self.fade = None
        if score.fade_RTH is not None and score.fade_RSH is not None:
            self.fade = (
                self.by_head(score.fade_RTH[..., None]),
                self.by_head(score.fade_RSH[..., None]).transpose(-1, -2),
            )
        self.relative = None
        if score.relative_NH is not None:
            self.relative = score.relative_NH.T.to(self.wide).contiguous()  # (H, distances)

    def by_head(self, x: Tensor) -> Tensor:
        """`(R, T, heads, W)` to `(N, heads a key head, T, W)`, contiguous."""
        x = x.to(self.wide).unflatten(2, (self.G, x.shape[2] // self.G))
        return x.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()

    def by_token(self, x: Tensor) -> Tensor:
        """Inverse of `by_head`."""
        return x.unflatten(0, (self.R, self.G)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def walk(self) -> Iterator[tuple[_Tile, list[_Tile]]]:
        """Some queries as a tile without keys, and the tiles of all keys that they may see."""
        for a in range(0, self.T, QUERIES):
            t = slice(a, min(a + QUERIES, self.T))
            keys = list(self._keys(t))
            most = max((s.stop - s.start for s, _ in keys), default=1)
            n = max(1, IN_HAND // (self.M * (t.stop - a) * most))
            rows, heads = max(1, n // self.G), min(n, self.G)
            for r0 in range(0, self.R, rows):
                r = slice(r0, min(r0 + rows, self.R))
                for g0 in range(0, self.G, heads):
                    g = slice(g0, min(g0 + heads, self.G))
                    whole = slice(r0 * self.G + g0, (r.stop - 1) * self.G + g.stop)
                    some = [_Tile(r, g, whole, t, s, hidden) for s, hidden in keys]
                    yield _Tile(r, g, whole, t, slice(0, 0), []), some

    def _keys(self, t: slice) -> Iterator[tuple[slice, list[tuple[slice, Tensor]]]]:
        """Keys that any of the queries ``t`` may see, and which of them which query may not."""
        mask, ahead = self.mask, self.S - self.T
        first, last = 0, self.S
        if mask.window:
            first = max(0, t.start + ahead - mask.window + 1)
        if mask.causal and mask.prefix_RT is None:
            last = max(0, t.stop + ahead)
        for c in range(first, last, KEYS):
            s = slice(c, min(c + KEYS, last))
            hidden = self._hidden(t, s)
            if hidden is not None:
                yield s, hidden

    def _hidden(self, t: slice, s: slice) -> list[tuple[slice, Tensor]] | None:
        """Columns with hidden tokens in them; None when nothing is seen."""
        mask, device = self.mask, self.q.device
        at = torch.arange(t.start, t.stop, device=device)[:, None] + self.S - self.T
        dense: list[Tensor] = []
        hidden = []
        if mask.allowed_RTS is not None:
            dense.append(~mask.allowed_RTS[:, t, s])
        if mask.document_RT is not None and mask.document_RS is not None:
            q, k = mask.document_RT[:, t, None], mask.document_RS[:, None, s]
            dense.append((q != k) | (k == 0))
        if mask.causal and mask.prefix_RT is not None and mask.prefix_RS is not None:
            q, k = mask.prefix_RT[:, t, None], mask.prefix_RS[:, None, s]
            late = at < torch.arange(s.start, s.stop, device=device)
            dense.append(late & ((q != k) | (k == 0)))
        elif mask.causal:
            begin = max(s.start, t.start + self.S - self.T + 1)
            if begin < s.stop:
                late = at < torch.arange(begin, s.stop, device=device)
                hidden.append((slice(begin - s.start, s.stop - s.start), late[None]))
        if mask.window:
            end = min(s.stop, t.stop + self.S - self.T - mask.window)
            if end > s.start:
                early = at - torch.arange(s.start, end, device=device) >= mask.window
                hidden.append((slice(0, end - s.start), early[None]))
        if dense:
            both = dense[0]
            for more in dense[1:]:
                both = both | more
            if self.asks and both.all():
                return None
            if not self.asks or both.any():
                hidden.append((slice(0, s.stop - s.start), both))
        return hidden

    def split(self, x: Tensor, tile: _Tile) -> Tensor:
        """`(n, M * C, E)` to `(rows, heads, M, C, E)`."""
        r, g = tile.r.stop - tile.r.start, tile.g.stop - tile.g.start
        return x.view(r, g, self.M, -1, x.shape[-1])

    def scores(self, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """`(n, M * C, E)` logits, hidden ones -inf, and the tanh of a soft-cap."""
        score = self.score
        flat = torch.bmm(self.q[tile.n, :, tile.t].flatten(1, 2), self.k[tile.n, tile.s].mT)
        bent = None
        if score.softcap:
            bent = flat.div_(score.softcap).tanh_()
            flat = bent * score.softcap
        s = self.split(flat, tile)
        if score.bias_RHTS is not None:
            s += self._of_bias(score.bias_RHTS, tile).to(s.dtype)
        if self.fade is not None:
            s -= self._faded(tile).abs_()
        if self.relative is not None:
            s += self._of_relative(tile)
        for columns, hidden in tile.hidden:
            at = tile.r if hidden.shape[0] > 1 else slice(None)
            s[..., columns].masked_fill_(hidden[at, None, None], -math.inf)
        return flat, bent

    def _of_bias(self, x: Tensor, tile: _Tile) -> Tensor:
        """View of what belongs to a tile in a tensor that broadcasts to `(R, H, T, S)`."""
        x = x[(None,) * (4 - x.dim())]
        at = zip(x.shape, (tile.r, slice(None), tile.t, tile.s), strict=True)
        x = x[tuple(slice(None) if n == 1 else s for n, s in at)]
        if x.shape[1] == 1:
            return x[:, None]
        return x.unflatten(1, (self.G, self.M))[:, tile.g]

    def _faded(self, tile: _Tile) -> Tensor:
        assert self.fade is not None
        q, k = self.fade
        return self.split((q[tile.n, :, tile.t] - k[tile.n, :, :, tile.s]).flatten(1, 2), tile)

    def _distance(self, tile: _Tile) -> Tensor:
        """`(rows, C, E)` int64 index into the distances of `relative`."""
        q, k = self.score.position_RT, self.score.position_RS
        assert q is not None and k is not None and self.relative is not None
        far = self.relative.shape[1] // 2
        d = q[tile.r, tile.t, None].long() - k[tile.r, None, tile.s].long()
        return d.clamp_(-far, far).add_(far)

    def _of_relative(self, tile: _Tile) -> Tensor:
        assert self.relative is not None
        table, d = self.relative.view(self.G, self.M, -1)[tile.g], self._distance(tile)
        if self.asks:
            low, high = (int(x) for x in torch.aminmax(d))
            if low == high:
                return table[..., low][None, :, :, None, None]
        return table[..., d].movedim(2, 0)

    def add_relative(self, to: Tensor, ds: Tensor, tile: _Tile) -> None:
        """Sum the gradient of a tile's scores by distance into ``to`` `(H, distances)`."""
        to, d = to.view(self.G, self.M, -1)[tile.g], self._distance(tile)
        if self.asks:
            low, high = (int(x) for x in torch.aminmax(d))
            if low == high:
                to[..., low] += ds.sum((0, 3, 4))
                return
        flat = ds.movedim(0, 2).flatten(2)
        to.scatter_add_(2, d.flatten().expand_as(flat), flat)


def _cut(x: Tensor, t: slice) -> Tensor:
    return x[:, :, t].flatten(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """`(R, T, H, V)` output and `(N, M, T, 1)` log-sum-exp (0 where nothing is seen)."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, mask, score)
        y = tiles.v.new_empty(tiles.k.shape[0], tiles.M, tiles.T, tiles.V)
        lse = tiles.v.new_empty(*y.shape[:-1], 1)
        for at, row in tiles.walk():
            top = total = out = None
            for tile in row:
                s = tiles.scores(tile)[0]
                new = s.amax(-1, keepdim=True)
                if top is not None:
                    new = torch.maximum(new, top)
                # A query that saw nothing yet has -inf: exp(-inf - 0) is the zero it needs.
                base = new.masked_fill(new == -math.inf, 0)
                p = s.sub_(base).exp_()
                if top is None or total is None or out is None:
                    total, out = p.sum(-1, keepdim=True), torch.bmm(p, tiles.v[tile.n, tile.s])
                else:
                    shrunk = top.sub_(base).exp_()
                    total = total.mul_(shrunk).add_(p.sum(-1, keepdim=True))
                    out = out.mul_(shrunk).baddbmm_(p, tiles.v[tile.n, tile.s])
                top = new
            tile = at
            if top is None or total is None or out is None:
                shape = (tile.n.stop - tile.n.start, tiles.M * (tile.t.stop - tile.t.start), 1)
                top, total = tiles.v.new_zeros(shape), tiles.v.new_zeros(shape)
                out = tiles.v.new_zeros(*shape[:2], tiles.V)
            if score.sink_H is not None:
                sink = _sink(tiles, tile)
                total, top, out = _add_sink(total, top, out, sink)
            empty = total == 0
            out.div_(total.masked_fill(empty, 1))
            shape = (out.shape[0], tiles.M, -1)
            y[tile.n, :, tile.t] = out.view(*shape, tiles.V)
            ends = (top + total.log_()).masked_fill_(empty, 0)
            lse[tile.n, :, tile.t] = ends.view(*shape, 1)
        return tiles.by_token(y).to(v.dtype).contiguous(), lse


def _sink(tiles: _Tiles, tile: _Tile) -> Tensor:
    """`(n, M * C, 1)` logits of the sink."""
    assert tiles.score.sink_H is not None
    sink = tiles.score.sink_H.to(tiles.wide).view(tiles.G, tiles.M)[tile.g]
    C, r = tile.t.stop - tile.t.start, tile.r.stop - tile.r.start
    return sink[None, :, :, None, None].expand(r, -1, -1, C, 1).reshape(-1, tiles.M * C, 1)


def _add_sink(
    total: Tensor, top: Tensor, out: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A sink is one more key of value zero."""
    new = torch.maximum(torch.where(total == 0, sink, top), sink)
    shrunk = torch.where(total == 0, 0, (top - new).exp())
    return total * shrunk + (sink - new).exp(), new, out * shrunk


def backward(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec,
    y: Tensor, lse: Tensor, dy: Tensor, need: Collection[str],
) -> dict[str, Tensor]:  # fmt: skip
    """Return gradients by name: q, k, v, and those of the scores' fields that are in ``need``."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, mask, score)
        dout = tiles.by_head(dy)
        delta = (dout * tiles.by_head(y)).sum(-1, keepdim=True)
        dq, dk, dv = (torch.zeros_like(x) for x in (tiles.q, tiles.k, tiles.v))
        made: dict[str, Tensor] = {}
        if score.bias_RHTS is not None and "bias_RHTS" in need:
            made["bias_RHTS"] = torch.zeros_like(score.bias_RHTS, dtype=tiles.wide)
        faded = None
        if tiles.fade is not None and "fade_RTH" in need:
            faded = tuple(torch.zeros_like(x) for x in tiles.fade)
        if tiles.relative is not None and "relative_NH" in need:
            made["relative_NH"] = torch.zeros_like(tiles.relative)
        for at, row in tiles.walk():
            t, n = at.t, at.n
            tq, td = _cut(tiles.q[n], t), _cut(dout[n], t)
            ends, dots = _cut(lse[n], t), _cut(delta[n], t)
            own = torch.zeros_like(tq)
            for tile in row:
                s, bent = tiles.scores(tile)
                p = s.sub_(ends).exp_()
                dv[n, tile.s] += torch.bmm(p.mT, td)
                ds = torch.bmm(td, tiles.v[n, tile.s].mT).sub_(dots).mul_(p)
                by_head = tiles.split(ds, tile)
                if "bias_RHTS" in made:
                    part = tiles._of_bias(made["bias_RHTS"], tile)
                    part += by_head.sum_to_size(part.shape)
                if faded is not None:
                    turned = by_head * tiles._faded(tile).sign_()
                    faded[0][n, :, t] -= turned.sum(-1, keepdim=True).flatten(0, 1)
                    faded[1][n, :, :, tile.s] += turned.sum(-2, keepdim=True).flatten(0, 1)
                if "relative_NH" in made:
                    tiles.add_relative(made["relative_NH"], by_head, tile)
                if bent is not None:
                    ds.mul_(bent.square_().neg_().add_(1))
                own.baddbmm_(ds, tiles.k[n, tile.s])
                dk[n, tile.s] += torch.bmm(ds.mT, tq)
            dq[n, :, t] = own.view(own.shape[0], tiles.M, -1, tiles.K)
        made["q"] = tiles.by_token(dq * tiles.scale)
        made["k"], made["v"] = tiles.by_token(dk[:, None]), tiles.by_token(dv[:, None])
        if faded is not None:
            made["fade_RTH"] = tiles.by_token(faded[0])[..., 0]
            made["fade_RSH"] = tiles.by_token(faded[1].mT)[..., 0]
        if "relative_NH" in made:
            made["relative_NH"] = made["relative_NH"].T
        if score.sink_H is not None and "sink_H" in need:
            sink = score.sink_H.to(tiles.wide).view(1, tiles.G, tiles.M, 1)
            p = (sink - lse.view(tiles.R, tiles.G, tiles.M, -1)).exp_()
            made["sink_H"] = -(p * delta.view_as(p)).sum((0, 3)).flatten()
        like = {"q": q, "k": k, "v": v, **score._asdict()}
        return {name: g.to(like[name].dtype).contiguous() for name, g in made.items()}


def statistics(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `(R, H, S)` mass that each key receives, `(R, H, T)` entropy of each query."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, v, mask, score)
        mass = lse.new_zeros(tiles.k.shape[0], tiles.M, tiles.S)
        entropy = lse.new_zeros(*lse.shape[:-1])
        for at, row in tiles.walk():
            t, n = at.t, at.n
            ends = _cut(lse[n], t)
            for tile in row:
                s = tiles.split(tiles.scores(tile)[0].sub_(ends), tile).flatten(0, 1)
                p = s.exp()
                mass[n, :, tile.s] += p.sum(-2)
                # A hidden key is 0 * -inf here, and adds nothing.
                entropy[n, :, t] -= (p * s.masked_fill_(p == 0, 0)).sum(-1)
            if score.sink_H is not None:
                s = _sink(tiles, at) - ends
                entropy[n, :, t] -= (s.exp() * s).view(s.shape[0], tiles.M, -1)
        shape = (tiles.R, tiles.H, -1)
        return mass.view(shape), entropy.view(shape)
