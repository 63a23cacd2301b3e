"""Everything between ids and losses. B rows, T tokens, D model, S streams, N slots, P places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm.batch import Sum, Values
from mm.errors import UserError
from mm.mask import Mask
from mm.model.context import Ctx
from mm.model.draft import draft_call
from mm.model.initial_weights import fill_all
from mm.model.stateful import Stateful, nearest
from mm.state import State, join_parts, parts_of
from mm.vocabulary import Range, Vocabulary

NONE: Mapping[str, Any] = {}


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
    # how processes share the tokens of a row (mm/model/sequence.py); None: they cannot
    shard: Literal["local", "ulysses", "carry", "halo", None] = None
    # Named fields, published values, memories ("memories.source") that it needs, that it provides
    reads: frozenset[str] = frozenset()
    publishes: frozenset[str] = frozenset()


class Out(NamedTuple):
    y: Tensor  # (B, T, D)
    state: State | None = None
    ctx: Ctx | None = None  # successor Ctx; None = unchanged
    aux: Mapping[str, Sum] = NONE  # balance, commitment, statistics. Returned, never stored on self


class Transducer(Stateful):
    """What takes something of each token to an `Out`, with a State or without: layers, embedders.

    The SAME call trains, prefills, continues and steps.
    """

    # A draft call keeps what it read, and `State.accept` runs a prefix of it again. False: the
    # State that it returns can be cut (caches), or its parts see to it (blocks and backbones).
    replays: bool = False

    def __call__(self, x_BT: Tensor, ctx: Ctx, state: State | None = None, *more: Any) -> Out:
        if state is None or not self.replays:
            return super().__call__(x_BT, ctx, state, *more)
        if not ctx.draft:
            return super().__call__(x_BT, ctx, state.commit())
        return draft_call(super().__call__, x_BT, ctx, state.commit())


class Layer(Transducer):
    """Mixer, FeedForward, Block, wrapper and Backbone are all this."""

    caps: Caps = Caps()
    path: str = ""  # its qualified name in the network (`name_layers`); keys of noise and reports
    kind: str = ""  # of its config, for messages
    provider_row: int = 0  # which of the readers of its Provider this layer is; the backbone says
    # Writes into results of its matrix products (torch's fused cells): none may be kept for later.
    overwrites: bool = False

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        raise NotImplementedError

    def provider(self) -> tuple[str, Callable[[int], Provider]] | None:
        """Name of the Provider this layer reads from `Ctx.provided`, and how to make it; or None.

        It is made for a number of readers.

        A backbone makes one for each name. A layer called without a backbone is its only reader
        and finds nothing.
        """
        return None

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        """Make what this layer takes from `Ctx.cached_on_host` before a compiled graph asks for it.

        Only speed depends on it. A wrapper that runs its parts in another context passes that on.
        ``serving``: the pass has a State.
        """
        for part in layers_in(self):
            part.prefetch(ctx, serving)

    def check_mask(self, mask: Mask) -> None:
        """Refuse a mask that this layer or a part of it cannot run under.

        A wrapper that runs its parts under another mask passes that on.

        Raises:
            UserError: names the layer and what it needs.
        """
        for part in layers_in(self):
            part.check_mask(mask)

    def report(self, **sums: Sum) -> dict[str, Sum]:
        """Losses and statistics under this module's qualified name, for `Out.aux`."""
        return {f"{self.path}.{k}" if self.path else k: v for k, v in sums.items()}

    def init_weights(self) -> None:
        """Fill every own parameter and buffer (children do theirs); ``__init__`` only allocates."""

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Apply the layer's own globally summed statistics (EMA codebooks, balance).

        They come by their short names; `mm.model.hand_back` calls it. A forward mutates no buffer.
        """


class Mixer(Layer):
    """Plug point; a word of the pattern."""

    replays = True
    masks: frozenset[str] | None = None  # hints of the masks it can run under; None = any

    def check_mask(self, mask: Mask) -> None:
        if self.masks is not None and mask.hint not in self.masks:
            name = self.kind or type(self).__name__
            raise UserError(
                f"{self.path or 'mixer'}: {name} cannot run under a {mask.key} mask: it needs "
                f"mask: {' or '.join(sorted(self.masks))}, or take another mixer"
            )
        super().check_mask(mask)


class LinearMixer(Mixer):
    """A mixer whose output is a matrix of its features times its values: wrappers compose on these.

    Its stateful parts are two: what its features look back on, then its memory.
    The `matrix form` law: ``attention_matrix(f, ctx) @ f["v"]``, by head, is what `core` returns
    without a state.
    """

    def features(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None
    ) -> tuple[dict[str, Tensor], State | None]:
        """The arguments of the Op, `(B, T, H, .)`, among them values ``v``.

        With them the first part's State after the call.
        """
        raise NotImplementedError

    def core(
        self, f: dict[str, Tensor], ctx: Ctx, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Outputs `(B, T, H, V)` and the memory's State after the call."""
        raise NotImplementedError

    def finish(self, o: Tensor, x_BTD: Tensor, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """Skip, gate, norm and output projection: `(B, T, D)`."""
        raise NotImplementedError

    def attention_matrix(self, f: dict[str, Tensor], ctx: Ctx) -> Tensor:
        """`(B, H, T, T)`: what each token reads of each value."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        tail, memory = parts_of(state, 2)
        f, tail = self.features(x_BTD, ctx, tail)
        o, memory = self.core(f, ctx, memory)
        return Out(self.finish(o, x_BTD, f, ctx), join_parts(tail, memory))


class FeedForward(Layer):
    """Plug point; needs ctx and state too (token shift, routing).

    Experts are ONE module with stacked weights.
    """

    replays = True


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
    """Runs once before layer 0 for each name that layers read; its result enters `Ctx.shared`."""

    def forward(self, ctx: Ctx) -> Tensor:
        raise NotImplementedError


class Linear(nn.Module):
    """Plug point: every matrix of a layer is ``linear(d_in, d_out, name)``."""

    name: str = ""  # "out": the last matrix of a residual branch, which depth scales down
    path: str = ""  # its qualified name in the network (`name_layers`)
    adapter_parameters: tuple[str, ...] = ()  # own ones that by default train alone (LoRA)
    exact: bool = True  # its output is one matrix times its input
    # Own matrices that read as many values as it does: the model's width sets their rate (muP).
    wide_parameters: tuple[str, ...] = ("weight",)

    @property
    def ends_branch(self) -> bool:
        """Whether its output is added to the residual stream (the `depth scaling` law)."""
        return self.name == "out"

    def read_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Learn its modalities; `Model` calls it. Raises UserError where others are named."""

    def rescale(self, factor: float) -> None:
        """Multiply the map by ``factor``."""
        raise NotImplementedError

    def from_dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own tensors that stand for those of a `Dense`, ``weight`` and perhaps ``bias``."""
        return dict(tensors)

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


class Embedder(Transducer):
    """Plug point: ids `(B, T, S)` to vectors `(B, T, D)`; its State is that of its parts."""

    replays = True
    n_ids: int
    weight: Tensor  # (N, R) a row an id; without: `head_parameters` and `rows_of` say otherwise
    looked_up: tuple[str, ...] = ("weight",)  # own parameters whose rows are taken, not multiplied
    # Own ones as wide as the model, multiplied by the root of its width: that sets their rate (muP)
    wide_parameters: tuple[str, ...] = ("weight",)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """What a tied head owns, too: rows `(N, R)`, and `(R, D)` if that is what makes D of R.

        Raises:
            UserError: no head can; names the embedder, and what to set.
        """
        return self.weight, None

    def rows_of(self, codes: Range) -> Tensor:
        """The rows of a modality's codes, to be written to."""
        return self.weight[codes.first : codes.stop]

    def forward(self, ids_BTS: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        raise NotImplementedError


class Adapter(nn.Module):
    """Plug point: continuous values to embeddings of their reserved places."""

    keeps_length: bool = False  # an item of L values fills L places, always
    looked_up: tuple[str, ...] = ()  # own parameters whose rows are taken, not multiplied (muP)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, L, ...)`: what a batch without this modality runs, so that all ranks run alike."""
        raise NotImplementedError

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        raise NotImplementedError


class Distribution(Protocol):
    """Parameter-free result of a head.

    One that a loss is made of is a named tuple: ZeRO stage 3 finds its tensors, and gathers the
    head's weights for their backward.
    """

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


class Head(Stateful):
    """Plug point: hidden states to unreduced nll per place, or a Distribution; may hold Layers."""

    reads: str = "hidden"  # the intermediate that it reads
    predicts: str = ""  # whose places and targets of the batch it takes; "" = those of its name
    predicts_ids: bool = True  # False: it runs where a batch has places or targets of its own
    vocabulary: Vocabulary = Vocabulary()  # of the model; which ids are of which codebook
    tied: bool = False  # whether its matrix is the embedder's
    looked_up: tuple[str, ...] = ()  # own parameters whose rows are taken, not multiplied (muP)
    scale_free: bool = False  # what it says does not depend on the length of `weight` (muP)
    weight: Tensor  # the matrix to the ids
    projection: Tensor | None  # (R, D), of an embedder whose rows are narrower than D

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("projection", None)

    def tie(self, embedder: Embedder) -> None:
        """Own the embedder's very Parameters.

        This module's own forward uses them, so ZeRO-3 gathers them here too.
        """
        self.weight, self.projection = embedder.head_parameters()

    def narrow(self, h: Tensor) -> Tensor:
        """`(..., D)` as the rows of `weight` read it, `(..., R)`."""
        if self.projection is None:
            return h
        return nn.functional.linear(h, self.projection.to(h.dtype))

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


def init_weights(module: nn.Module, seed: int | None = None) -> None:
    """Run `init_weights` of every submodule, parents after children: a parent may rescale.

    Random values follow from ``seed`` and the module's name; None: it is drawn.
    """
    fill_all(module, seed)


def layers_in(module: nn.Module) -> Iterator[Layer]:
    """The nearest Layers below a module."""
    return nearest(module, Layer)


def name_layers(root: nn.Module) -> None:
    """Tell every Layer and Linear of a network its qualified name. What builds one calls it."""
    for name, module in root.named_modules():
        if isinstance(module, (Layer, Linear)):
            module.path = name


def zero_gradient_touch(parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    """A zero that hangs on parameters which a pass does not need.

    Their gradients are zeros, not missing.
    """
    return sum((p.reshape(-1)[:0].sum() for p in parameters), like.new_zeros(())).to(like.dtype)
