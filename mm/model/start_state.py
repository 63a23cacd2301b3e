"""What every document begins from, learned, while the network may stay as it is.

M documents, N slots, P prefix tokens, D model, G key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.layout import Doc, Fields, Layout
from mm.model.context import Ctx
from mm.model.layer import Backbone, Out
from mm.model.mixers.attention.kv_cache import KV
from mm.state import State, StateTuple

STD = 0.02  # of a prefix as it begins


class StartConfig(Config):
    """Documents begin from something learned: a State, a prefix in each layer, or a prompt."""

    kind: Annotated[
        Literal["state", "prefix", "prompt"],
        Field(
            description="state: initial states of recurrent layers, at first those they have; "
            "prefix: keys and values before each document in layers of attention, and those "
            "states; prompt: vectors that the whole network reads before each document"
        ),
    ] = "state"
    length: Annotated[int, Field(gt=0, description="tokens of a prefix or a prompt")] = 16

    def build(self, backbone: Backbone, d_model: int) -> StartState:
        return StartState(self, backbone, d_model)


class StartState(nn.Module):
    """The State before a document's first token, the same for each.

    Every document is run as one that goes on from a State, packed rows in training as well.

    Source: initial states alone (state tuning): Lemerle et al. 2024, Lina-Speech
    (arXiv:2410.23320), section 3.3; keys and values (prefix tuning): Li & Liang 2021
    (arXiv:2101.00190), section 4.2; vectors (prompt tuning): Lester et al. 2021
    (arXiv:2104.08691), section 2.
    """

    adapter_parameters: tuple[str, ...]  # those that train alone by default

    def __init__(self, config: StartConfig, backbone: Backbone, d_model: int):
        super().__init__()
        self.config = config
        self.adapter_parameters = ()
        if config.kind == "prompt":
            self._add(config.length, d_model)
        else:
            short, long = (backbone.initial_state(1, n) for n in (3, 11))
            for here, there in zip(_nodes(short), _nodes(long), strict=True):
                if isinstance(here, KV):
                    if config.kind == "prefix":
                        G, K, V = here.k.shape[1], here.k.shape[3], here.v.shape[3]
                        self._add(config.length, G, K)
                        self._add(config.length, G, V)
                    continue
                for a, b in zip(here.leaves(), there.leaves(), strict=True):
                    if a.shape != b.shape or not a.is_floating_point():
                        kind = type(here).__name__
                        raise UserError(f"model.start: a layer's state {kind} is none to learn")
                    self._add(*a.shape[1:])
        if not self.adapter_parameters:
            raise UserError(f"model.start: {config.kind}: no layer has such a state")

    def _add(self, *shape: int) -> None:
        """One parameter more, of this very module: ZeRO-3 gathers those of whose forward it is."""
        name = f"leaf_{len(self.adapter_parameters)}"
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.adapter_parameters += (name,)

    @property
    def leaves(self) -> list[nn.Parameter]:
        """What is learned, in the order of the layers."""
        return [getattr(self, name) for name in self.adapter_parameters]

    def init_weights(self) -> None:
        for p in self.leaves:
            nn.init.normal_(p, std=STD) if self.config.kind != "state" else nn.init.zeros_(p)

    @property
    def length(self) -> int:
        """Tokens that caches must have room for, besides a document's."""
        return 0 if self.config.kind == "state" else self.config.length

    def run(
        self, backbone: Backbone, x: Tensor, ctx: Ctx, state: State | None, path: Any = None
    ) -> Out:
        """A call of the backbone whose documents begin from it; a State only where one is given."""
        begun, layout = self.begin(backbone, ctx, state)
        out = backbone(x, replace(ctx, layout=layout), begun, path)
        return out if state is not None else out._replace(state=None)

    def forward(self) -> tuple[Tensor, ...]:
        """Copies of what is learned: tensors alone, so that ZeRO-3 knows its backward pass, too."""
        return tuple(p.clone() for p in self.leaves)

    def begin(self, backbone: Backbone, ctx: Ctx, state: State | None) -> tuple[State, Layout]:
        """The State that a pass begins from, and its layout, of which no document is fresh.

        Args:
            backbone: of the same network.
            ctx: of the pass.
            state: that of the pass; None: each document gets a slot.
        """
        if ctx.shard is not None:
            raise UserError("model.start: rows on several processes cannot begin from it")
        layout, host = ctx.layout, ctx.layout.on_host()
        M = len(layout.slot)
        if state is None:
            state = backbone.initial_state(M, layout.max_seqlen + self.length)
            assert state is not None
            slots = torch.arange(M, dtype=host.slot.dtype)
            host = replace(host, slot=slots, fresh=torch.ones(M, dtype=torch.bool), aligned=False)
        there = host.arrays().length > 0
        fresh = host.fresh.numpy() & there
        if (host.slot.numpy()[fresh] < 0).any():
            raise ValueError("a document without a slot in a pass with a State")
        if fresh.any():
            N = next(iter(state.leaves())).shape[0]
            mask = torch.zeros(N, dtype=torch.bool)
            mask[host.slot[torch.from_numpy(fresh)].long()] = True
            mask = mask.to(layout.slot.device, non_blocking=True)
            state = self._put(backbone, ctx, state.commit(), mask)  # type: ignore[attr-defined]
        host = replace(host, fresh=torch.zeros(M, dtype=torch.bool))
        return state, host if layout.is_on_host else host.to(layout.slot.device)

    def _put(self, backbone: Backbone, ctx: Ctx, state: State, fresh_N: Tensor) -> State:
        """The state with what is learned in the slots ``fresh_N``."""
        leaves = self()
        if self.config.kind == "prompt":
            return self._read(leaves[0], backbone, ctx, state, fresh_N)
        own, blank = iter(leaves), _nodes(backbone.initial_state(1, 1))

        def begin(node: State) -> State:
            fresh = next(blank)
            if not isinstance(node, KV):
                leaves = iter([t + next(own).to(t) for t in fresh.leaves()])
                return node.map(lambda t: _where(fresh_N, next(leaves).to(t), t))
            if not self.length:  # an empty cache
                none = node.k.new_zeros(0, *node.k.shape[1::2])
                return _store(node, none, node.v.new_zeros(0, *node.v.shape[1::2]), fresh_N)
            return _store(node, next(own), next(own), fresh_N)

        return _rebuild(state, begin)

    def _read(
        self, x: Tensor, backbone: Backbone, ctx: Ctx, state: State, fresh_N: Tensor
    ) -> State:
        """The prompt (P, D), read by the network at the places before a document's first."""
        P = len(x)
        layout = Layout.from_rows([[Doc(P, start=-P, slot=0)]]).to(x.device)
        zeros = layout.fields.document.new_zeros(1, P)
        extra = {name: zeros for name in ctx.layout.fields.extra}
        layout = layout.map_fields(lambda f: f._replace(extra=extra))
        none = None if ctx.ids is None else ctx.ids.new_full((1, P, ctx.ids.shape[-1]), -1)
        inner = replace(ctx, layout=layout, ids=none, draft=False)
        after = backbone(x[None], inner, backbone.initial_state(1, P)).state
        assert after is not None
        read = _nodes(after)

        def begin(node: State) -> State:
            its = next(read)
            if isinstance(node, KV) and isinstance(its, KV):
                k, v = its.k[0].transpose(0, 1), its.v[0].transpose(0, 1)
                return _store(node, k, v, fresh_N, its.fields)
            leaves = its.leaves()
            return node.map(lambda t: _where(fresh_N, next(leaves), t))

        return _rebuild(state, begin)


def _store(
    node: KV, k_PGK: Tensor, v_PGV: Tensor, fresh_N: Tensor, fields: Fields | None = None
) -> KV:
    """The cache with a prefix in its fresh slots; at the first place where nothing is said."""
    N, P = len(fresh_N), len(k_PGK)
    if fields is None:
        zeros = torch.zeros(1, P, dtype=torch.int32, device=k_PGK.device)
        axes = node.fields.position.shape[-1]
        extra = {name: zeros for name in node.fields.extra}
        fields = Fields(zeros[..., None].expand(1, P, axes), zeros + 1, zeros, extra)
    every = lambda t: t.expand(N, *t.shape[1:])
    return node.append(
        every(k_PGK[None]).to(node.k),
        every(v_PGV[None]).to(node.v),
        fields.map(every),
        fresh_N.long() * P,
        fresh_N,
        True,
    )


def _where(fresh_N: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(fresh_N.view(-1, *[1] * (old.dim() - 1)), new, old)


def _nodes(state: Any) -> Iterator[State]:
    """The States of parts that are no tuples, in order."""
    if isinstance(state, StateTuple):
        for part in state.parts:
            yield from _nodes(part)
    elif state is not None:
        yield state


def _rebuild(state: State, f: Callable[[State], State]) -> State:
    """The same tree with ``f`` of each of `_nodes`."""
    if not isinstance(state, StateTuple):
        return f(state)
    return StateTuple(*(p if p is None else _rebuild(p, f) for p in state.parts))
