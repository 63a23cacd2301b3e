"""DeltaNet and Gated DeltaNet. B rows, T tokens, D model, H heads, K key width, V value width, N
slots, R rows of one document, L their length, C taps, W = H (2 K + V).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.kernels.causal_conv import causal_conv
from mm.kernels.delta_rule import delta_rule
from mm.kernels.glu import glu
from mm.kernels.rms_norm import rms_norm
from mm.model.layer import Caps, Ctx, Linear, Mixer, Out
from mm.model.linears.dense import DenseConfig
from mm.model.norm import RMSNorm
from mm.model.rows import Docs, by_document, share_groups
from mm.registry import MIXERS
from mm.state import State, Struct

EPS = 1e-6  # added to the squared length of queries and keys


@dataclass(frozen=True)
class Associations(Struct):
    """What each head has written, and the convolution's last inputs."""

    S: Tensor  # (N, H, K, V) float32 or wider
    tail: Tensor  # (N, C - 1, W)

    def accept(self, n_N: Tensor) -> Associations:
        raise ValueError("accept() takes the State of a call with draft=True")

    def settled(self) -> Associations:
        return self


@dataclass(frozen=True)
class DraftAssociations(Struct):
    """The state before a draft call, and what its tokens write: `accept` writes the first n."""

    S: Tensor  # (N, H, K, V)
    inputs: Tensor  # (N, C - 1 + L, W) the old tail, then the call's convolution inputs
    k: Tensor  # (N, L, H, K)
    v: Tensor  # (N, L, H, V)
    beta: Tensor  # (N, L, H)
    g: Tensor | None  # (N, L, H)
    length: Tensor  # (N,)

    def accept(self, n_N: Tensor) -> Associations:
        n = torch.minimum(n_N.to(self.length), self.length)
        L = self.k.shape[1]
        after = torch.arange(L, device=n.device) >= n[:, None]
        # Selected, not multiplied: a wrong guess may hold inf.
        k, v = (x.masked_fill(after[..., None, None], 0) for x in (self.k, self.v))
        beta = self.beta.masked_fill(after[..., None], 0)
        g = None if self.g is None else self.g.masked_fill(after[..., None], 0)
        S = delta_rule(k, k, v, beta, g, self.S)[1]
        taps = self.inputs.shape[1] - L
        places = n[:, None] + torch.arange(taps, device=n.device)
        tail = self.inputs.gather(1, places[..., None].expand(-1, -1, self.inputs.shape[-1]))
        return Associations(torch.where((n > 0)[:, None, None, None], S, self.S), tail)

    def settled(self) -> Associations:
        return self.accept(self.length)


class DeltaRule(Mixer):
    """Every head keeps a map from keys to values; a token erases what the map holds for its key and
    writes its value there.

    Queries, keys and values: a short causal convolution, SiLU, then unit length (queries, keys).
    Source: Yang et al. 2024, DeltaNet (arXiv:2406.06484), section 3.3; gate: Yang et al. 2024,
    Gated DeltaNet (arXiv:2412.06464), section 3.4, decay ``exp(-A softplus(a + bias))`` as in Dao &
    Gu 2024 (arXiv:2405.21060); negative eigenvalues: Grazzi et al. 2024 (arXiv:2411.12537).
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(
        self,
        d_model: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        taps: int,
        gated: bool,
        negative_eigenvalues: bool,
        output_gate: bool,
        linear: Callable[..., Linear],
    ):
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.taps = heads, key_dim, value_dim, taps
        self.width = heads * (2 * key_dim + value_dim)
        self.gated, self.top = gated, 2.0 if negative_eigenvalues else 1.0
        self.qkv = linear(d_model, self.width, "qkv")
        self.rates = linear(d_model, heads * (1 + gated), "rates")
        self.gate = linear(d_model, heads * value_dim, "gate") if output_gate else None
        self.out = linear(heads * value_dim, d_model, "out")
        self.norm = RMSNorm(value_dim)
        self.conv_weight = nn.Parameter(torch.empty(taps, self.width)) if taps > 1 else None
        self.log_decay = nn.Parameter(torch.empty(heads)) if gated else None
        self.rate_bias = nn.Parameter(torch.empty(heads)) if gated else None

    def init_weights(self) -> None:
        if self.conv_weight is not None:
            nn.init.normal_(self.conv_weight, std=self.taps**-0.5)
        if self.log_decay is None or self.rate_bias is None:
            return
        with torch.no_grad():
            wide = torch.empty_like(self.rate_bias, dtype=torch.float32)
            self.log_decay.copy_(wide.uniform_(1, 16).log())
            # softplus(bias) log-uniform in [0.001, 0.1]
            rate = wide.uniform_(-3, -1).mul(torch.log(torch.tensor(10.0))).exp()
            self.rate_bias.copy_(rate.expm1().log())

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        return share_groups(serving)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T = x_BTD.shape[:2]
        u, rates = self.qkv(x_BTD, ctx), self.rates(x_BTD, ctx)
        if state is None:
            o, after = self._whole(u, rates, ctx), None
        else:
            assert isinstance(state, Associations | DraftAssociations)
            o, after = self._continued(u, rates, ctx, state.settled())
        y = self.norm(o).view(B, T, self.heads * self.value_dim)
        if self.gate is not None:
            y = glu(self.gate(x_BTD, ctx), y.to(x_BTD.dtype))
        return Out(self.out(y.to(x_BTD.dtype), ctx), after)

    def _whole(self, u: Tensor, rates: Tensor, ctx: Ctx) -> Tensor:
        """Outputs `(B, T, H, V)` of documents that all begin here."""
        u = self._convolved(u, ctx.layout.fields.document)
        return by_document(lambda *x: self._mixed(*self._arguments(*x))[0], ctx, u, rates)

    def _continued(
        self, u: Tensor, rates: Tensor, ctx: Ctx, state: Associations
    ) -> tuple[Tensor, Associations | DraftAssociations]:
        """Outputs `(B, T, H, V)` of documents that go on from their slots."""
        B, T = u.shape[:2]
        N = state.S.shape[0]
        docs = Docs.of(ctx.layout, N)
        rows = docs.unpack(u).masked_fill(~docs.valid[..., None], 0)
        inputs = torch.cat((docs.read(state.tail).to(rows.dtype), rows), dim=1)
        # The tail is the document's own past here: the convolution needs no borders, and its first
        # outputs are the tail's.
        one = torch.ones_like(inputs[..., 0], dtype=torch.int32)
        rows = self._convolved(inputs, one)[:, self.taps - 1 :]
        q, k, v, beta, g = self._arguments(rows, docs.unpack(rates), docs.valid)
        before = docs.read(state.S)
        o, last = self._mixed(q, k, v, beta, g, before)
        w = docs.written(N)
        # A slot that nobody writes keeps its state, as one that a row of length 0 wrote.
        tails = w.take(inputs).to(state.tail.dtype)
        old = torch.where(w.hit[:, None, None], tails[:, : self.taps - 1], state.tail)
        drafted = DraftAssociations(
            w.write(state.S, before),
            torch.cat((old, tails[:, self.taps - 1 :]), dim=1),
            w.take(k),
            w.take(v),
            w.take(beta),
            None if g is None else w.take(g),
            w.length,
        )
        o = docs.pack(o, B, T)
        if ctx.draft:
            return o, drafted
        places = w.length[:, None] + torch.arange(self.taps - 1, device=u.device)
        tail = drafted.inputs.gather(1, places[..., None].expand(-1, -1, self.width))
        return o, Associations(w.write(state.S, last), tail)

    def _convolved(self, u: Tensor, document: Tensor) -> Tensor:
        """Convolution inside documents, then SiLU."""
        if self.conv_weight is not None:
            zero = self.conv_weight.new_zeros(self.width)
            u = causal_conv(u, self.conv_weight, zero, document)
        return F.silu(u)

    def _arguments(
        self, u: Tensor, rates: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values `(R, L, H, ...)`, writing strengths and log decays `(R, L, H)`;
        places that are not ``valid`` write and forget nothing.
        """
        H, K, V = self.heads, self.key_dim, self.value_dim
        wide = torch.promote_types(rates.dtype, torch.float32)
        if valid is not None:
            u = u.masked_fill(~valid[..., None], 0)
        q, k, v = (x.unflatten(-1, (H, -1)) for x in u.split((H * K, H * K, H * V), dim=-1))
        beta, *rest = rates.to(wide).unflatten(-1, (-1, H)).unbind(-2)
        beta, g = self.top * beta.sigmoid(), None
        if self.log_decay is not None and self.rate_bias is not None:
            g = -self.log_decay.to(wide).exp() * F.softplus(rest[0] + self.rate_bias.to(wide))
        if valid is not None:
            beta = beta.masked_fill(~valid[..., None], 0)
            g = None if g is None else g.masked_fill(~valid[..., None], 0)
        return self._unit(q), self._unit(k), v, beta, g

    def _unit(self, x: Tensor) -> Tensor:
        """``x / |x|`` over the last dimension, which is an RMS norm with one scale for all."""
        K = self.key_dim
        return rms_norm(x, x.new_full((K,), K**-0.5), EPS / K)

    def _mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return delta_rule(q, k, v, beta, g, before, scale=self.key_dim**-0.5)

    def initial_state(self, n: int, max_len: int) -> Associations:
        like = self.norm.weight.detach()
        wide = torch.promote_types(like.dtype, torch.float32)
        return Associations(
            like.new_zeros(n, self.heads, self.key_dim, self.value_dim, dtype=wide),
            like.new_zeros(n, self.taps - 1, self.width),
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self.norm.weight.element_size()
        matrices = self.heads * self.key_dim * self.value_dim * max(item, 4)
        return n * (matrices + (self.taps - 1) * self.width * item)


@MIXERS.register("delta_rule")
class DeltaRuleConfig(Config):
    """Delta rule (fast weights that overwrite), optionally gated."""

    kind: Literal["delta_rule"] = "delta_rule"
    heads: Annotated[int, Field(gt=0)] = 4
    key_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None
    value_dim: Annotated[int, Field(gt=0, description="default: key_dim")] | None = None
    taps: Annotated[int, Field(gt=0, description="width of the causal convolution; 1: none")] = 4
    gate: Annotated[
        Literal["none", "scalar"], Field(description="decay of the state, one for each head")
    ] = "none"
    negative_eigenvalues: Annotated[
        bool, Field(description="writing strengths in (0, 2), for tracking states, not (0, 1)")
    ] = False
    output_gate: Annotated[bool, Field(description="SiLU gate after the norm of the output")] = (
        False
    )

    def build(self, d_model: int, linear: Callable[..., Linear] | None = None) -> DeltaRule:
        if self.key_dim is None and d_model % self.heads:
            raise ValueError(
                f"delta_rule: d_model {d_model} is not a multiple of heads {self.heads}; "
                "set key_dim"
            )
        key_dim = self.key_dim or d_model // self.heads
        return DeltaRule(
            d_model,
            self.heads,
            key_dim,
            self.value_dim or key_dim,
            self.taps,
            self.gate == "scalar",
            self.negative_eigenvalues,
            self.output_gate,
            linear or DenseConfig().build,
        )

    @classmethod
    def smallest(cls) -> DeltaRuleConfig:
        return cls(
            heads=2,
            key_dim=4,
            value_dim=6,
            gate="scalar",
            negative_eigenvalues=True,
            output_gate=True,
        )
