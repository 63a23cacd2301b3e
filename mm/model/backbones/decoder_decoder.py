"""Decoder-decoder: layers that share the keys and values of one place in the stack.

B rows, T tokens, D model, H heads, G key heads, K head width, N slots, R rows of one document, L
their length, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.layout import Fields
from mm.model.backbones.stack import Stack, StackConfig
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import CachedAttention, HeadsConfig, Sizes
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.norm import RMSNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import adds_to_input
from mm.model.recompute import Recompute
from mm.model.varlen import PackedRows, paired
from mm.registry import BACKBONES, BlockField, FfnField
from mm.state import State, StateTuple

MEMORY = "decoder_decoder.memory"


@dataclass(frozen=True, slots=True)
class Published:
    """What the upper layers attend to.

    Without a State: keys and values `(B, T, G, .)` of the call; with one: those of rows of one
    document, cached ones first.
    """

    k: Tensor
    v: Tensor
    docs: PackedRows | None = None
    fields: Fields | None = None  # (R, L) of the call
    known: Fields | None = None  # (R, S) of the keys
    allowed: Tensor | None = None  # (R, L, S)


class SharedMemory(Block):
    """Hand the input on, and publish what the layers above attend to; owns the only cache of it.

    ``own_keys``: the normed input itself is published, for layers that make their own keys of it;
    otherwise one set of keys and values for all.
    """

    caps = Caps(causal=True, bidirectional=True, step=True, publishes=frozenset({MEMORY}))

    def __init__(
        self,
        d_model: int,
        sizes: tuple[int, int],
        own_keys: bool,
        eps: float,
        position: Position,
        linear: LinearFactory,
    ):
        super().__init__()
        G, K = sizes
        self.sizes = sizes
        # Positions that score, or scale queries, have nothing to do with keys alone.
        self.position = position if position.key else Position()
        self.norm = RMSNorm(d_model, eps=eps)
        self.kv = None if own_keys else linear(d_model, 2 * G * K, "kv")
        self.cached = Sizes(1, d_model, 0) if own_keys else Sizes(G, K, K)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, KV | DraftKV)
        h, f = self.norm(x_BTD), ctx.layout.fields
        k, v = h[:, :, None], h[:, :, None, :0]
        if self.kv is not None:
            k, v = self.kv(h, ctx).unflatten(-1, (2 * self.sizes[0], -1)).chunk(2, dim=2)
            k = self.position.rotate_call(ctx, k, k)[1]
        made, after = Published(k, v), None
        if state is not None:
            cache = state.commit()
            docs = PackedRows.of(ctx.layout, cache.count.shape[0])
            rows = docs.fields(f)
            k, v = docs.unpack(k), docs.unpack(v)
            past_k, past_v, past_f = cache.past(docs, rows)
            known = paired(lambda old, new: torch.cat((old, new), dim=1), past_f, rows)
            keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
            values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
            made = Published(keys, values, docs, rows, known, ctx.mask.dense(rows, known))
            after = advance(cache, k, v, rows, docs, ctx.draft)
        return Out(x_BTD, after, replace(ctx, published={**ctx.published, MEMORY: made}))

    def initial_state(self, n: int, max_len: int) -> KV:
        like = self.norm.weight
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        c = self.cached
        return KV.empty(n, c.heads, max_len, c.key, c.value, False, like.detach())

    def state_bytes(self, n: int, max_len: int) -> int:
        c, item = self.cached, self.norm.weight.element_size()
        return KV.bytes(n, c.heads, max_len, c.key, c.value, item)


class CrossAttention(CachedAttention):
    """Queries of this layer's own, keys and values of the published memory; no State."""

    caps = Caps(causal=True, bidirectional=True, step=True, reads=frozenset({MEMORY}))

    def __init__(
        self,
        d_model: int,
        sizes: tuple[int, int, int],
        own_keys: bool,
        position: Position,
        linear: LinearFactory,
    ):
        heads, G, K = sizes
        super().__init__(Sizes(G, K, K), position)
        self.heads, self.kv_heads, self.head_dim = heads, G, K
        self.q = linear(d_model, heads * K, "q")
        self.kv = linear(d_model, 2 * G * K, "kv") if own_keys else None
        self.out = linear(heads * K, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        memory = ctx.published.get(MEMORY)
        if not isinstance(memory, Published):
            raise ValueError(
                "this layer reads a memory that a `decoder_decoder` backbone publishes"
            )
        B, T = x_BTD.shape[:2]
        q = self.q(x_BTD, ctx).view(B, T, self.heads, self.head_dim)
        q = self.rotated(q, q, ctx)[0]
        k, v = memory.k, memory.v
        f = memory.known or ctx.layout.fields
        if self.kv is not None:
            kv = self.kv(k[:, :, 0], ctx if memory.docs is None else None)
            k, v = kv.unflatten(-1, (2 * self.kv_heads, -1)).chunk(2, dim=2)
            k = self.position.rotate(k, k, f, f)[1]
        if memory.docs is None:
            y = self.whole((q, k, v), ctx)
        else:
            q = memory.docs.unpack(q)
            assert memory.fields is not None
            bias = self.position.score(q, memory.fields, f) if self.scored else None
            y = self.attend(q, k, v, memory.allowed, False, bias, True)
            y = memory.docs.pack(y, B, T)
        return Out(self.out(y.reshape(B, T, self.heads * self.head_dim), ctx))

    def initial_state(self, n: int, max_len: int) -> None:
        return None

    def state_bytes(self, n: int, max_len: int) -> int:
        return 0


class DecoderDecoder(Stack):
    """A stack of lower blocks, one `SharedMemory`, and upper blocks of `CrossAttention`.

    Source: Sun et al. 2024, You Only Cache Once (arXiv:2405.05254), section 2: with one set of keys
    and values. Layers that make their own of the model's input: InAttention (arXiv:2410.07063).
    """

    def __init__(
        self,
        lower: list[Block],
        memory: SharedMemory,
        upper: list[Block],
        d_model: int,
        eps: float,
        recompute: str,
    ):
        super().__init__([*lower, memory, *upper], d_model, eps, recompute)
        self.prefix = len(lower) + 1

    def prefill(self, x_BTD: Tensor, ctx: Ctx, state: StateTuple) -> StateTuple:
        """State after tokens whose outputs nobody needs.

        The upper layers do not run, and what follows is exactly what it would be if they had.
        """
        below = StateTuple(*state.parts[: self.prefix])
        out = self(x_BTD, ctx, below, list(range(self.prefix)))
        assert isinstance(out.state, StateTuple)
        return StateTuple(*out.state.parts, *state.parts[self.prefix :])


@BACKBONES.register("decoder_decoder")
class DecoderDecoderConfig(HeadsConfig):
    """Lower layers by a pattern, then ``upper`` layers of attention to one shared memory."""

    renamed: ClassVar[dict[str, str]] = {"channel": "ffn"}

    kind: Literal["decoder_decoder"] = "decoder_decoder"
    lower: StackConfig | None = Field(
        default_factory=lambda: StackConfig(pattern="local_attention", depth=4),
        description="the layers below the memory; null: the memory is the model's input",
    )
    upper: Annotated[int, Field(gt=0, description="layers that attend to the memory")] = 4
    own_keys: Annotated[
        bool, Field(description="each upper layer makes its own keys and values of the memory")
    ] = False
    ffn: FfnField | None = Field(default="swiglu", validate_default=True)
    block: BlockField = Field(default="prenorm", validate_default=True)
    eps: float = 1e-6
    recompute: Recompute = "none"

    def build(self, d_model: int, linear: LinearFactory = dense) -> DecoderDecoder:
        heads, G, K = self.sizes(d_model)
        place = lambda: self.placed(K, d_model)
        if adds_to_input(place()):
            raise ValueError(
                f"decoder_decoder: position '{self.position.kind}' is added to a layer's input, "
                "but these layers share keys: use rope, alibi, t5_bias or none"
            )
        lower = list(self.lower.build(d_model, linear).layers) if self.lower else []
        memory = SharedMemory(d_model, (G, K), self.own_keys, self.eps, place(), linear)
        upper = [
            self.block.build(
                d_model,
                CrossAttention(d_model, (heads, G, K), self.own_keys, place(), linear),
                self.ffn.build(d_model, linear) if self.ffn else None,
            )
            for _ in range(self.upper)
        ]
        return DecoderDecoder(lower, memory, upper, d_model, self.eps, self.recompute)  # type: ignore[arg-type]

    @classmethod
    def smallest(cls) -> DecoderDecoderConfig:
        local = StackConfig(
            pattern="local_attention",
            mixers={"local_attention": {"heads": 2, "window": 3}},
            ffn=None,
        )
        return cls(heads=2, kv_heads=1, lower=local, upper=2, ffn=None)
