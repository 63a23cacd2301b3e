"""The one shape of everything between embedding and head. B rows, T tokens, D model, S streams, N
slots, P places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm.batch import Sum, Values
from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields, Layout
from mm.mask import Mask
from mm.state import State

NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Memory:
    """Something else to attend to: encoder states, neighbours, compressed context; several
    coexist.
    """

    layout: Layout  # its `document` holds the READER's document ids: that is the link
    mask: Mask
    x: Tensor | None = None  # (B, Tm, Dm), or instead kv: reader layer -> (K, V)
    kv: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bias: Tensor | None = None  # (B, Tm) added to logits, with gradient


@dataclass(frozen=True, slots=True)
class Ctx:
    """Immutable context of one pass. A layer that publishes something returns a successor
    (`dataclasses.replace`).
    """

    layout: Layout
    mask: Mask
    ids: Tensor | None = None  # (B, T, S), for mixers that look at tokens
    memories: Mapping[str, Memory] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(
        default_factory=dict
    )  # from `Layer.shares`, Providers or earlier layers
    scheduled: Mapping[str, float] = field(default_factory=dict)  # host values equal on all ranks
    return_intermediates: frozenset[str] = (
        frozenset()
    )  # intermediates and statistics asked for; nothing is paid when empty
    seed: Tensor | int = (
        0  # counter-based noise from (seed, visit, name): recomputation draws the same
    )
    visit: int = 0
    draft: bool = False  # the returned State must be able to accept() a prefix of this call
    shard: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """What a layer declares; validated at config time, tested by the laws."""

    causal: bool = True
    bidirectional: bool = False
    step: bool = True  # has a State
    length_general: bool = True
    lookahead: int = 0
    exact: bool = True
    sequential: bool = False  # token t waits for token t - 1: its paper has no parallel form
    shard: Literal["ulysses", "carry", "halo", None] = None
    reads: frozenset[str] = frozenset()
    publishes: frozenset[str] = frozenset()


class Out(NamedTuple):
    y: Tensor  # (B, T, D)
    state: State | None = None
    ctx: Ctx | None = None  # successor Ctx; None = unchanged
    aux: Mapping[str, Sum] = NONE  # balance, commitment, statistics. Returned, never stored on self


class Layer(nn.Module):
    """Mixer, FeedForward, Block, wrapper and Backbone are all this. The SAME call trains, prefills,
    continues and steps.
    """

    caps: Caps = Caps()
    place: int = 0  # which of the readers of its Provider this layer is; the backbone says
    # Writes into results of its matrix products (torch's fused cells): none may be kept for later.
    overwrites: bool = False

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        raise NotImplementedError

    def provider(self) -> tuple[str, Callable[[int], Provider]] | None:
        """Name of the Provider this layer reads from `Ctx.shared`, and how to make it for a number
        of readers; None = none.

        A backbone makes one for each name. A layer called without a backbone is its only reader
        and finds nothing.
        """
        return None

    def initial_state(self, n: int, max_len: int) -> State | None:
        """State of ``n`` fresh slots that will hold at most ``max_len`` tokens; None for a layer
        without state.
        """
        return None

    def state_bytes(self, n: int, max_len: int) -> int:
        """Declared bytes of `initial_state(n, max_len)` (law 4). A layer with a State states its
        formula.
        """
        return 0

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        """What all layers of a pass can share, by name: a backbone makes each once, before layer 0,
        into `Ctx.shared`.

        A layer called without a backbone makes its own. ``serving``: the pass has a State.
        """
        return NONE

    def init_weights(self) -> None:
        """Fill every own parameter and buffer (children do theirs); ``__init__`` only allocates."""

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Apply globally summed aux statistics (EMA codebooks, balance): a forward mutates no
        buffer.
        """


class Mixer(Layer):
    """Plug point; a word of the pattern."""


class LinearMixer(Mixer):
    """A mixer whose output is a matrix of its features times its values: wrappers compose on these.

    Law 5: ``attention_matrix(f, ctx) @ f["v"]``, by head, is what `core` returns without a state.
    """

    def features(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> dict[str, Tensor]:
        """The arguments of the Op, `(B, T, H, .)`, among them values ``v``."""
        raise NotImplementedError

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Outputs `(B, T, H, V)` and the State after the call."""
        raise NotImplementedError

    def finish(self, o: Tensor, x_BTD: Tensor, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """Skip, gate, norm and output projection: `(B, T, D)`."""
        raise NotImplementedError

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """`(B, H, T, T)`: what each place reads of each value."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        f = self.features(x_BTD, ctx, state)
        o, after = self.core(f, ctx, state)
        return Out(self.finish(o, x_BTD, f, ctx), after)


class FeedForward(Layer):
    """Plug point; needs ctx and state too (token shift, routing). Experts are ONE module with
    stacked weights.
    """


class Block(Layer):
    """Plug point: the wiring of a mixer and a feed-forward layer."""


class Backbone(Layer):
    """Plug point: stack, hierarchy, encoder-decoder, segments, looped."""

    def forward(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None, path: Sequence[int] | None = None
    ) -> Out:
        """``path``: layers to run, in order (exit, loop, skip); equal on all ranks in training."""
        raise NotImplementedError


class Provider(nn.Module):
    """One per distinct name its layers read; run once before layer 0, its result enters
    Ctx.shared.
    """

    def forward(self, ctx: Ctx) -> Tensor:
        raise NotImplementedError


class Position:
    """Plug point; every hook optional."""

    length_general: bool = True  # False: there are places it does not know
    key: str = ""  # non-empty: `prepare` is worth sharing over the layers of a pass under this name

    def prepare(self, f: Fields) -> Any:
        """What `apply` needs to know of the places."""
        return None

    def apply(self, x: Tensor, prepared: Any) -> Tensor:
        """`(B, T, H, K)` queries or keys to rotated ones: `rotate` with a prepared table."""
        return x

    def ids(self, f: Fields, ctx: Ctx) -> Tensor:
        return f.position

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        """Vectors with their places: asked by the embedder, or by a layer with this position."""
        return x_BTD

    def rotate(self, q: Tensor, k: Tensor, fq: Fields, fk: Fields) -> tuple[Tensor, Tensor]:
        """`(B, T, H, K)` queries and keys to rotated ones. Keys are cached after rotation."""
        return q, k

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor | None:
        return None

    def gain(self, fq: Fields, fk: Fields) -> Tensor | None:
        return None

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        """`score` and `gain` in one value; overridden where vectors say as much as a score of every
        pair.
        """
        return ScoreSpec(self.score(q, fq, fk), self.gain(fq, fk))


class Linear(nn.Module):
    """Plug point: every matrix of a layer is ``linear(d_in, d_out, name)``."""

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        raise NotImplementedError


LinearFactory = Callable[..., Linear]  # (d_in, d_out, name) -> Linear


class AdapterOutput(NamedTuple):
    """What an Adapter puts into reserved places."""

    x: Tensor | None  # (G, R, D) embeddings, or
    ids: Tensor | None  # (G, R, S) late ids
    length: Tensor  # (G,)
    targets: Tensor | None = None
    aux: Mapping[str, Sum] = NONE


class Embedder(nn.Module):
    """Plug point: ids to vectors; ONE table for all ranges."""

    def forward(self, ids_BTS: Tensor, ctx: Ctx) -> Tensor:
        raise NotImplementedError


class Adapter(nn.Module):
    """Plug point: continuous values to embeddings of their reserved places."""

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        raise NotImplementedError


class Distribution(Protocol):
    """Parameter-free result of a head."""

    @property
    def logits(self) -> Tensor | None:
        """`(P, N)` where the support is finite."""
        ...

    def log_prob(self, value: Tensor) -> Tensor: ...
    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Tensor: ...


class HeadOut(NamedTuple):
    nll: Tensor | None  # (P,) float32, unreduced
    dist: Distribution | None  # only when asked
    state: State | None = None
    aux: Mapping[str, Sum] = NONE


class Head(nn.Module):
    """Plug point: hidden states to unreduced nll per place, or a Distribution."""

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        raise NotImplementedError


class ModelOut(NamedTuple):
    """What every network of the trainer returns (language models and tokenizers alike)."""

    hidden: Tensor
    heads: Mapping[str, HeadOut]
    state: State | None
    intermediates: Mapping[str, Tensor]
    aux: Mapping[str, Sum]


def init_weights(module: nn.Module) -> None:
    """Run `init_weights` of every submodule that has one, parents after children (so a parent may
    rescale).
    """
    for child in module.children():
        init_weights(child)
    own = getattr(module, "init_weights", None)
    if callable(own):
        own()
