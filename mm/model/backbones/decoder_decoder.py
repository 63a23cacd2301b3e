"""Decoder-decoder: layers that share the keys and values of one layer of the stack.

B rows, T tokens, D model, H heads, G key heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mm.kernels.attention.spec import MaskSpec
from mm.model.backbones.stack import Stack, StackConfig
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, LinearFactory, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.base import AttentionBase, AttentionRows, HeadsConfig
from mm.model.mixers.attention.kv_cache import KeyValueCache, VisibleKeys
from mm.model.norm import RMSNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import adds_to_input
from mm.model.recompute import Recompute
from mm.registry import BACKBONES, BlockField, FfnField
from mm.state import State, StateTuple

MEMORY = "decoder_decoder.memory"


@dataclass(frozen=True, slots=True)
class Published:
    """What the upper layers attend to: keys and values `(B, T, G, .)` of the call.

    With a State, those of rows of one document instead, cached ones first.
    """

    k: Tensor
    v: Tensor
    seen: VisibleKeys | None = None
    mask: MaskSpec | None = None  # of the rows


class SharedMemory(Block):
    """Hand the input on, and publish what the layers above attend to; owns the only cache of it.

    Args:
        own_keys: publish the normed input itself, for layers that make their own keys of it;
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
        self.cache = KeyValueCache(1, d_model, 0) if own_keys else KeyValueCache(G, K, K)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        h = self.norm(x_BTD)
        k, v = h[:, :, None], h[:, :, None, :0]
        if self.kv is not None:
            k, v = self.kv(h, ctx).unflatten(-1, (2 * self.sizes[0], -1)).chunk(2, dim=2)
            k = self.position.rotate_call(ctx, k, k)[1]
        made, after = Published(k, v), None
        if state is not None:
            seen, after = self.cache(k, v, ctx, state)
            mask = seen.mask(ctx.mask)
            made = Published(seen.k, seen.v, seen, mask)
        return Out(x_BTD, after, replace(ctx, published={**ctx.published, MEMORY: made}))


class CrossAttention(AttentionBase):
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
        super().__init__(position)
        heads, G, K = self.heads, self.kv_heads, self.head_dim = sizes
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
        q = self.position.rotate_call(ctx, q, q)[0]
        k, v, seen = memory.k, memory.v, memory.seen
        if self.kv is not None:
            f = ctx.layout.fields if seen is None else seen.known
            kv = self.kv(k[:, :, 0], ctx if seen is None else ctx.at_places(f))
            k, v = kv.unflatten(-1, (2 * self.kv_heads, -1)).chunk(2, dim=2)
            k = self.position.rotate(k, k, f, f)[1]
        if seen is None:
            return Out(self.finish(self._forward_full((q, k, v), ctx), x_BTD, ctx, False))
        assert memory.mask is not None
        q = seen.docs.unpack(q)
        score = self.scores(q, seen.fields, seen.known)
        y = self.attend(AttentionRows(q, k.to(q.dtype), v, memory.mask, score, cached=True))
        return Out(self.finish(seen.docs.pack(y), x_BTD, ctx, True))


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
        """State after tokens whose outputs nobody needs: the upper layers do not run.

        What follows is exactly what it would be if they had.
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
    own_keys: bool = Field(
        default=False, description="each upper layer makes its own keys and values of the memory"
    )
    ffn: FfnField | None = Field(default="swiglu", validate_default=True)
    block: BlockField = Field(default="prenorm", validate_default=True)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    recompute: Recompute = "none"

    small = {
        **HeadsConfig.small,
        "lower": {
            "pattern": "local_attention",
            "mixers": {"local_attention": {"heads": 2, "window": 3}},
            "ffn": None,
        },
        "upper": 2,
        "ffn": None,
    }

    def build(self, d_model: int, linear: LinearFactory = dense) -> DecoderDecoder:
        heads, G, K = self.sizes(d_model)
        position = lambda: self.build_position(K, d_model)
        if adds_to_input(position()):
            raise ValueError(
                f"decoder_decoder: position '{self.position.kind}' is added to a layer's input, "
                "but these layers share keys: use rope, alibi, t5_bias or none"
            )
        lower = list(self.lower.build(d_model, linear).layers) if self.lower else []
        memory = SharedMemory(d_model, (G, K), self.own_keys, self.eps, position(), linear)
        upper = [
            self.block.build(
                d_model,
                CrossAttention(d_model, (heads, G, K), self.own_keys, position(), linear),
                self.ffn.build(d_model, linear) if self.ffn else None,
            )
            for _ in range(self.upper)
        ]
        return DecoderDecoder(lower, memory, upper, d_model, self.eps, self.recompute)  # type: ignore[arg-type]
