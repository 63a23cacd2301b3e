"""Attention-free mixing: averages whose weights no query moves.

B rows, T tokens, D model, H heads, N slots, R rows of one document, L their length, W window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.errors import UserError
from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State

FLOOR = -1e30  # a maximum over nothing: finite, so that differences stay numbers


@dataclass(frozen=True)
class Averages(DataclassState):
    """Sums over what left the window, and the window's keys and values."""

    sums: Tensor  # (N, 3, D) float32 or wider: largest key, then sums scaled by exp(-largest key)
    tail: Tensor  # (N, W, 2, D) keys (-inf where there is none) and values
    count: Tensor  # (N,) int64


class _LagAverage(torch.autograd.Function):
    """``(e^{m-M} num + sum_j e^{w_j + k_{i-j} - M} v_{i-j}) / (the same of den and 1)``.

    One lag at a time in both directions, so that memory holds no axis of lags. ``M`` is the largest
    exponent: no exponential exceeds 1.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, w: Tensor, m: Tensor, num: Tensor, den: Tensor
    ) -> Tensor:
        L, W = m.shape[1], k.shape[1] - m.shape[1]
        top = m
        for j in range(W):
            top = torch.maximum(top, _lag(w, j) + k[:, W - j : W - j + L])
        scale = (m - top).exp()
        y, total = scale * num, scale * den
        for j in range(W):
            p = (_lag(w, j) + k[:, W - j : W - j + L] - top).exp()
            y, total = y + p * v[:, W - j : W - j + L], total + p
        y = y / total
        ctx.save_for_backward(k, v, w, m, top, total, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        k, v, w, m, top, total, y = ctx.saved_tensors
        L, W = m.shape[1], k.shape[1] - m.shape[1]
        dk, dv, dw = torch.zeros_like(k), torch.zeros_like(v), []
        share = dy / total
        for j in range(W):
            here = slice(W - j, W - j + L)
            p = (_lag(w, j) + k[:, here] - top).exp() * share
            dv[:, here] += p
            # exp(-inf) * (0 - y): nothing, where there is no key
            s = p * (v[:, here] - y)
            dk[:, here] += s
            dw.append(s.sum((0, 1)) if w.dim() == 2 else s.sum(-1))
        scale = (m - top).exp() * share
        grad = torch.stack(dw, 0 if w.dim() == 2 else -1) if W else torch.zeros_like(w)
        return dk, dv, grad, None, scale, -scale * y


def _lag(w: Tensor, j: int) -> Tensor:
    """Bias of lag ``j``: ``w`` is `(W, D)`, or `(R, L, W)` for all channels."""
    return w[j] if w.dim() == 2 else w[..., j, None]


def running_sums(k_RLD: Tensor, v_RLD: Tensor, before_R3D: Tensor) -> Tensor:
    """`(R, L, 3, D)`: largest key m so far, and the sums of ``e^(k - m) v`` and ``e^(k - m)``."""
    m0, num, den = before_R3D.unbind(1)
    with torch.no_grad():  # quotients of the sums do not depend on it
        m = torch.maximum(k_RLD.cummax(1).values, m0[:, None])
        decay = (torch.cat((m0[:, None], m[:, :-1]), 1) - m).exp()
    e = (k_RLD - m).exp()
    D = k_RLD.shape[-1]
    sums, _ = linear_scan(
        torch.cat((decay, decay), -1),
        torch.cat((e * v_RLD, e), -1),
        None,
        torch.cat((num, den), -1),
    )
    return torch.cat((m[:, :, None], sums.view(*sums.shape[:2], 2, D)), 2)


class AFT(Mixer):
    """``y_t = sigmoid(q_t) * sum_s e^{k_s + w_ts} v_s / sum_s e^{k_s + w_ts}``, s up to t.

    By channel:

    * ``simple``: ``w = 0``: two sums are the whole state.
    * ``conv``: ``w`` by distance and head, 0 from ``window`` on; a head has one key.
    * ``local``: ``w_ts = a_t . b_s`` within ``window``, 0 beyond; positions are absolute.
    * ``full``: the same within ``max_len``.

    What left the window is a pair of sums that a scan carries, scaled by the largest key so far.

    Source: Zhai et al. 2021 (arXiv:2105.14103), eq. 2 and section 3 (variants), in causal form.
    """

    documents_apart = True

    def __init__(self, d_model: int, config: AFTConfig, linear: LinearFactory):
        super().__init__()
        if config.form == "conv" and d_model % config.heads:
            raise ValueError(f"aft: heads {config.heads} do not divide d_model {d_model}")
        self.form, self.width = config.form, d_model
        self.window = {"simple": 0, "full": config.max_len}.get(config.form, config.window)
        self.max_len = config.max_len if config.form in ("local", "full") else None
        self.heads = config.heads if config.form == "conv" else d_model
        self.qkv = linear(d_model, 2 * d_model + self.heads, "qkv")
        self.out = linear(d_model, d_model, "out")
        if self.form == "conv":
            self.bias = nn.Parameter(torch.empty(self.window, self.heads))
        elif self.max_len is not None:
            self.reader = nn.Parameter(torch.empty(self.max_len, config.rank))
            self.read = nn.Parameter(torch.empty(self.max_len, config.rank))
            self.caps = replace(type(self).caps, length_general=False)

    def init_weights(self) -> None:
        if self.form == "conv":
            nn.init.normal_(self.bias, std=0.1)
        elif self.max_len is not None:
            nn.init.normal_(self.reader, std=0.1)
            nn.init.normal_(self.read, std=0.1)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        D, H = self.width, self.heads
        q, v, k = self.qkv(x_BTD, ctx).split((D, D, H), dim=-1)
        wide = torch.promote_types(v.dtype, torch.float32)
        k, v = k.to(wide).repeat_interleave(D // H, dim=-1), v.to(wide)
        if state is None:
            y, after = per_document(self._first_rows, ctx, k, v), None
        else:
            y, after = self._rows_of_slots(k, v, ctx, state)
        return Out(self.out(q.sigmoid() * y.to(q.dtype), ctx), after)

    def _weights(self, at_RL: Tensor, like: Tensor) -> Tensor:
        """Biases by lag: `(W, D)`, or `(R or 1, L, W)` where they belong to positions."""
        if self.form == "simple":
            return like.new_zeros(0, self.width)
        if self.form == "conv":
            return self.bias.to(like).repeat_interleave(self.width // self.heads, dim=-1)
        W, L = self.window, at_RL.shape[1]
        assert self.max_len is not None
        # Padding may lie beyond the table; lags may reach before the document.
        known = lambda at: at.clamp(0, self.max_len - 1)  # type: ignore[operator]
        near = at_RL[:, :1] - W + 1 + torch.arange(L + W - 1, device=at_RL.device)
        pairs = self.reader.to(like)[known(at_RL)] @ self.read.to(like)[known(near)].mT
        lags = torch.arange(W, device=at_RL.device)
        index = torch.arange(L, device=at_RL.device)[:, None] + W - 1 - lags
        return pairs.gather(2, index.expand(len(pairs), -1, -1))

    def _average(self, inputs: Tensor, before: Tensor, at_RL: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, D)`, and the sums of what left the window at each token `(R, L, 3, D)`.

        Args:
            inputs: `(R, W + L, 2, D)` keys and values, the window before the rows first.
            before: `(R, 3, D)` sums of what left the window before.
            at_RL: positions, `(R or 1, L)`.
        """
        L = at_RL.shape[1]
        k, v = inputs.unbind(2)
        if not L or not len(k):
            return v[:, :L], inputs.new_zeros(len(k), L, 3, self.width)
        sums = running_sums(k[:, :L], v[:, :L], before)
        m, num, den = sums.unbind(2)
        w = self._weights(at_RL, k)
        if w.dim() == 3:
            w = w.expand(len(k), -1, -1)
        return _LagAverage.apply(k, v, w, m.detach(), num, den), sums  # type: ignore[return-value]

    def _before(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Sums `(3, D)` and window `(W, 2, D)` of a document that has not begun."""
        sums = like.new_zeros(3, self.width)
        sums[0] = FLOOR
        tail = like.new_zeros(self.window, 2, self.width)
        tail[:, 0] = -torch.inf
        return sums, tail

    def _first_rows(self, k: Tensor, v: Tensor) -> Tensor:
        """Outputs `(R, L, D)` of documents that begin here."""
        R, L = k.shape[:2]
        if self.max_len is not None and L > self.max_len:
            raise UserError(
                f"aft '{self.form}' knows positions up to {self.max_len}: a document has {L}; "
                "raise max_len"
            )
        sums, tail = (t.expand(R, *t.shape) for t in self._before(k))
        inputs = torch.cat((tail, torch.stack((k, v), 2)), 1)
        return self._average(inputs, sums, torch.arange(L, device=k.device)[None])[0]

    def _rows_of_slots(
        self, k: Tensor, v: Tensor, ctx: Ctx, state: State
    ) -> tuple[Tensor, Averages]:
        """Outputs `(B, T, D)` of documents that go on from their slots."""
        assert isinstance(state, Averages)
        N, W = state.tail.shape[:2]
        docs, (first_sums, first_tail) = PackedRows.of(ctx.layout, N), self._before(state.sums)
        before, count = docs.read(state.sums, first_sums), docs.read(state.count, 0)
        rows = torch.stack((docs.unpack(k), docs.unpack(v)), 2)
        inputs = torch.cat((docs.read(state.tail, first_tail).to(k), rows), 1)
        at = count[:, None] + torch.arange(rows.shape[1], device=k.device)
        y, sums = self._average(inputs, before.to(k), at)
        index = docs.length[:, None] + torch.arange(W, device=k.device)
        tail = inputs[torch.arange(len(inputs), device=k.device)[:, None], index]
        last = docs.last(sums.to(before), before)
        after = docs.write(state, sums=last, tail=tail, count=count + docs.length)
        return docs.pack(y), after

    def initial_state(self, n: int, max_len: int) -> Averages:
        if self.max_len is not None and max_len > self.max_len:
            raise UserError(
                f"aft '{self.form}' knows positions up to {self.max_len}, not {max_len}: "
                "raise max_len"
            )
        like = next(self.parameters()).detach()
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        sums, tail = (t.expand(n, *t.shape).clone() for t in self._before(like))
        return Averages(sums, tail, torch.zeros(n, dtype=torch.long, device=like.device))


@MIXERS.register("aft")
class AFTConfig(LayerConfig):
    """Attention-free transformer."""

    kind: Literal["aft"] = "aft"
    form: Literal["simple", "conv", "local", "full"] = "simple"
    heads: Annotated[int, Field(gt=0, description="of conv: a head has one key and bias")] = 4
    window: Annotated[int, Field(gt=0, description="of conv and local: distances with a bias")] = 32
    max_len: int = Field(
        default=2048, gt=0, description="of local and full: positions that are known"
    )
    rank: Annotated[int, Field(gt=0, description="of the factors of local's and full's bias")] = 128

    @model_validator(mode="after")
    def _fits(self) -> AFTConfig:
        if self.form == "local" and self.window > self.max_len:
            raise ValueError(f"aft: window {self.window} exceeds max_len {self.max_len}: use full")
        return self

    layer = AFT
