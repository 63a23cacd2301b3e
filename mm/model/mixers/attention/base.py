"""What attention mixers share: `project` to queries, keys and values, `attend`, `out`.

B rows, T tokens, D model, H heads, G key heads, K key width, V value width, R rows of one document,
L their length, S keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.layout import Fields
from mm.mask import Mask
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.length_buckets import LengthBuckets, stays_flat
from mm.model.mixers.attention.forget_gate import ForgetGate, add_fade, sums_since_start
from mm.model.mixers.attention.kv_cache import KeyValueCache, VisibleKeys
from mm.model.norm import FullNorm, HeadNorm, RMSNorm, ZeroCentredNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import refuse_drawn
from mm.model.sequence import heads_to_tokens, tokens_to_heads
from mm.model.varlen import PackedRows, narrow_mask
from mm.registry import PositionField
from mm.state import State, join_parts, parts_of


def head_dim_of(d_model: int, heads: int, head_dim: int | None) -> int:
    """Width of a head.

    Raises:
        ValueError: it is not given, and heads do not divide the model's width.
    """
    if head_dim is None and d_model % heads:
        raise ValueError(f"d_model {d_model} is not a multiple of heads {heads}; set head_dim")
    return head_dim or d_model // heads


def qk_norm_of(kind: bool | str, heads: int, width: int, eps: float) -> nn.Module:
    """The norm of queries or keys `(..., heads, width)`; ``kind`` as in `AttentionConfig`."""
    if kind == "heads":
        return HeadNorm(heads, width, eps)
    if kind == "full":
        return FullNorm(heads * width, eps)
    return (ZeroCentredNorm if kind == "zero_centred" else RMSNorm)(width, eps)


def changes(position: Position, hook: str) -> bool:
    """Whether a position has a hook of its own."""
    return getattr(type(position), hook) is not getattr(Position, hook)


class HeadSizesConfig(LayerConfig):
    """Heads of an attention mixer."""

    heads: Annotated[int, Field(gt=0)] = 4
    kv_heads: int | None = Field(
        default=None, gt=0, description="key heads; default: as many as heads"
    )
    head_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None

    small: ClassVar = {"heads": 2, "kv_heads": 1}

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """Heads, key heads and head width.

        Raises:
            ValueError: heads that do not divide.
        """
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {kv_heads}")
        return self.heads, kv_heads, head_dim_of(d_model, self.heads, self.head_dim)


class HeadsConfig(HeadSizesConfig):
    """Heads and positions of an attention mixer."""

    position: PositionField = Field(default="rope", validate_default=True)

    def build_position(self, width: int, d_model: int) -> Position:
        """The position of parts of ``width``."""
        return self.position.build(width, heads=self.heads, d_model=d_model)


class AttentionRows(NamedTuple):
    """What `attend` is given: rows of one document, or of several that the mask separates."""

    q: Tensor  # (R, T, H, K)
    k: Tensor  # (R, S, G, K)
    v: Tensor  # (R, S, G, V)
    mask: MaskSpec
    score: ScoreSpec
    # What `project` made besides: with a forget gate its logarithms `(R, T, H)`, or where the keys
    # are cached their sums since the start of the document, of queries and of keys.
    more: tuple[Tensor, ...] = ()
    cached: bool = False  # the keys come from the cache

    def fade(self, *gates: Tensor) -> ScoreSpec:
        """`score` with what forget gates, the last of ``more``, do to it."""
        if not self.cached:
            gates = (sums_since_start(gates[0], self.mask.document_RT),) * 2
        return add_fade(self.score, *gates)


class AttentionBase(Mixer):
    """Base: `project`, then `attend` documents to themselves and their caches, then `out`.

    Its State has, in this order: the cache; with ``tailed`` what `project` keeps of the last
    tokens; with a ``forget`` gate its sums, or what else a subclass keeps.
    """

    caps = Caps(causal=True, bidirectional=True, step=True)
    replays = False
    # Rare hooks of positions that it knows: a gain after the softmax, ids drawn for a pass.
    knows: ClassVar[frozenset[Literal["gain", "ids"]]] = frozenset()
    # Its `attend` takes rows of one document, in a compiled graph, too.
    separate_rows: ClassVar[bool] = False
    heads: int  # as positions count them
    window: int | None
    cache: KeyValueCache
    forget: ForgetGate | None
    tailed: bool = False
    out: nn.Module  # (B, T, H * V) -> (B, T, D)

    def __init__(self, position: Position, window: int | None = None):
        super().__init__()
        self.window = window
        name = type(self).__name__
        if "gain" not in self.knows and changes(position, "gain"):
            raise ValueError(f"{name} knows no positions with a gain after the softmax")
        if "ids" not in self.knows:
            refuse_drawn(position, name)
        self.position, self.forget = position, None
        # Positions that add to or multiply scores need the Fields of both sides.
        self.scored = any(changes(position, hook) for hook in ("score", "gain", "scores"))
        self.caps = replace(type(self).caps, length_general=position.length_general)

    @property
    def documents_apart(self) -> bool:
        # A score of every pair of places is a matrix, smaller document by document.
        pairs = self.scored and (not self.position.fades or self.forget is not None)
        return self.separate_rows or pairs

    # ---- what subclasses say ----

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], State | None]:
        """First arguments of `attend` `(B, T, ...)`, and the State that replaces ``tail``."""
        raise NotImplementedError

    def attend(self, rows: AttentionRows) -> Tensor:
        """Outputs `(R, T, ...)` of rows."""
        q, k, v, mask, score, fades, _ = rows
        return attention(q, k, v, mask, rows.fade(*fades) if fades else score)

    def finish(self, y: Tensor, x_BTD: Tensor, ctx: Ctx, serving: bool) -> Tensor:
        """The output projection: `(B, T, D)`."""
        return self.out(y.flatten(2), ctx)

    def mask(self, ctx: Ctx) -> Mask:
        """Who sees whom in this layer."""
        return narrow_mask(ctx.mask, self.window)

    def groups(self, ctx: Ctx) -> LengthBuckets | None:
        """The call's documents by length, or whole rows, with what the mask is within each."""
        window, flat = self.window, not self.documents_apart and stays_flat(ctx.layout)
        return ctx.cached_on_host(
            f"attention.{'rows' if flat else 'groups'}.{window}",
            lambda layout, mask: LengthBuckets.of(layout, narrow_mask(mask, window), True, flat),
        )

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        """What the position and the layer's settings do to scores."""
        return self.position.scores(q[:, :, : self.heads], fq, fk) if self.scored else ScoreSpec()

    # ---- the one path ----

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        if not serving:
            self.groups(ctx)
        if self.position.key:
            self.position.prepare_call(ctx, self.position_fields(ctx, serving))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        if self.masks is not None:
            self.check_mask(ctx.mask)
        if state is None:
            parts, _ = self.project(x_BTD, ctx, None, False)
            return Out(self.finish(self._forward_shared(parts, ctx), x_BTD, ctx, False))
        cache, *caches = parts_of(state, len(self.stateful_parts()))
        tails = [caches.pop(0)] if self.tailed else []
        parts, tail = self.project(x_BTD, ctx, tails[0] if tails else None, True)
        y, cache, *caches = self._forward_cached(parts, ctx, cache, *caches)
        after = join_parts(cache, *[tail for _ in tails], *caches)
        return Out(self.finish(y, x_BTD, ctx, True), after)

    def position_fields(self, ctx: Ctx, serving: bool) -> Fields:
        """Fields with the ids that the position draws in training; masks go by the true ones."""
        f = ctx.layout.fields
        if serving or not self.training:
            return f
        return f._replace(position=self.position.ids(f, ctx))

    def _forward_shared(self, parts: tuple[Tensor, ...], ctx: Ctx) -> Tensor:
        """`_forward_full`; where processes share the tokens, each takes all of some heads."""
        shard = ctx.shard
        if shard is None:
            return self._forward_full(parts, ctx)
        N = shard.size
        # Each process needs a key head of its own.
        alike = lambda x: x.repeat_interleave(N // x.shape[2], 2) if x.shape[2] < N else x
        whole = [tokens_to_heads(alike(x), shard) for x in parts]
        y = self._forward_full(tuple(whole), replace(ctx, layout=shard.whole))
        return heads_to_tokens(y, shard)

    def _scores(self, q: Tensor, fq: Fields, fk: Fields, ctx: Ctx) -> ScoreSpec:
        """`scores`, of the heads that this process has."""
        if ctx.shard is None:
            return self.scores(q, fq, fk)
        every = q[:, :, :1].expand(-1, -1, self.heads, -1)  # positions count heads
        n = self.heads // ctx.shard.size
        return self.scores(every, fq, fk).of_heads(n * ctx.shard.rank, n)

    def check_shard(self, size: int) -> str | None:
        """Why ``size`` processes cannot share its heads, or None."""
        G = getattr(self, "kv_heads", self.heads)
        if self.heads % size == 0 and (G % size == 0 or size % G == 0):
            return None
        fits = [
            n for n in range(1, self.heads + 1) if self.heads % n == 0 and not (G % n and n % G)
        ]
        heads = f"{self.heads} heads, {G} of keys,"
        return f"{heads} do not divide over {size} processes; possible: {fits}"

    def _forward_full(self, parts: tuple[Tensor, ...], ctx: Ctx) -> Tensor:
        """`attend` inside the call's documents."""
        true = ctx.layout.fields
        f = self.position_fields(ctx, False) if self.scored else true
        groups = self.groups(ctx)
        if groups is None:
            docs = PackedRows.of(ctx.layout, 0) if self.separate_rows else None
            if docs is not None:
                parts = tuple(map(docs.unpack, parts))
                f, true = docs.fields(f), docs.fields(true)
            q, k, v, *more = parts
            spec = MaskSpec(self.mask(ctx).dense(true, true))
            score = self._scores(q, f, f, ctx)
            y = self.attend(AttentionRows(q, k, v, spec, score, tuple(more)))
            return y if docs is None else docs.pack(y)
        known = [f.position, f.document, f.modality, *f.extra.values()] if self.scored else []
        done = []
        for group, given in groups.split(*parts, *known):
            (q, k, v, *more), rest = given[: len(parts)], given[len(parts) :]
            if rest:
                position, document, modality, *extra = rest
                f = Fields(position, document, modality, dict(zip(f.extra, extra, strict=True)))
            score = self._scores(q, f, f, ctx)
            done.append(self.attend(AttentionRows(q, k, v, group.mask, score, tuple(more))))
        return groups.join(done, *ctx.layout.shape)

    def _forward_cached(
        self, parts: tuple[Tensor, ...], ctx: Ctx, cache: Any, gates: Any = None
    ) -> tuple[Any, ...]:
        """`attend` each document to what its slot holds and to itself; then the caches after it."""
        (q, k, v, *kept), after = parts, []
        seen, stored = self.cache(k, v, ctx, cache)
        if self.forget is not None:
            *kept, after_gates = self.forget.extend(kept[0], ctx, gates)
            after = [after_gates]
        y = self.attend_cached(seen.docs.unpack(q), seen, ctx, *kept)
        return seen.docs.pack(y), stored, *after

    def attend_cached(self, q: Tensor, seen: VisibleKeys, ctx: Ctx, *fades: Tensor) -> Tensor:
        """`attend` of queries `(R, L, H, K)` to what they may look at."""
        mask = seen.mask(self.mask(ctx))
        score = self.scores(q, seen.fields, seen.known)
        rows = AttentionRows(q, seen.k.to(q.dtype), seen.v, mask, score, fades, cached=True)
        return self.attend(rows)


class GroupedAttention(AttentionBase):
    """Base: one projection to queries, keys and values, and groups of heads that share a key.

    Its config may have a ``window``, a ``qk_norm`` and a ``clip``.
    """

    def __init__(self, d_model: int, config: HeadsConfig, linear: LinearFactory):
        H, G, K = sizes = config.sizes(d_model)
        super().__init__(config.build_position(K, d_model), getattr(config, "window", None))
        self.heads, self.kv_heads, self.head_dim = sizes
        self.cache = self.make_cache()
        self.qkv = linear(d_model, (H + 2 * G) * K, "qkv")
        self.out = linear(H * K, d_model, "out")
        self.clip: float | None = getattr(config, "clip", None)
        qk_norm = getattr(config, "qk_norm", False)
        eps = getattr(config, "norm_eps", 1e-6)
        self.q_norm = qk_norm_of(qk_norm, H, K, eps) if qk_norm else None
        self.k_norm = qk_norm_of(qk_norm, G, K, eps) if qk_norm else None

    def make_cache(self) -> KeyValueCache:
        """What keeps keys and values."""
        return KeyValueCache(self.kv_heads, self.head_dim, self.head_dim, self.window)

    def shift_keys(
        self, x_BTD: Tensor, kv_BTGK: Tensor, ctx: Ctx, tail: State | None
    ) -> tuple[Tensor, State | None]:
        """Keys and values `(B, T, 2 G, K)` with what they take of earlier ones, and the State."""
        return kv_BTGK, tail

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], State | None]:
        H, G, K = self.heads, self.kv_heads, self.head_dim
        rotated = False
        f = self.position_fields(ctx, serving)
        x_BTD = self.position.embed(x_BTD, f)
        qkv = self.qkv(x_BTD, ctx).view(*x_BTD.shape[:2], H + 2 * G, K)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, kv = qkv.split_with_sizes((H, 2 * G), dim=2)
        moved, tail = self.shift_keys(x_BTD, kv, ctx, tail)
        k, v = moved.split_with_sizes((G, G), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm, self.k_norm)
            q, k = self.position.rotate_normed(ctx, q, k, norms, f)
            rotated = True
        elif serving and moved is kv and self.position.key:  # side by side still: one rotation
            table = self.position.prepare_call(ctx, f)
            turned = self.position.apply(qkv.narrow(2, 0, H + G), table)
            q, k = turned.split_with_sizes((H, G), dim=2)
            rotated = True
        if not rotated:
            q, k = self.position.rotate_call(ctx, q, k, f)
        kept = () if self.forget is None else (self.forget(x_BTD, ctx),)
        return (q, k, v, *kept), tail
