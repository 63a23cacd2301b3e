"""A stack of blocks whose mixers a pattern names. B rows, T tokens, D model, N slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mm import config as yaml_config
from mm.batch import Sum
from mm.config import Config
from mm.errors import UserError, did_you_mean
from mm.model import recompute as recomputing
from mm.model.backbones.pattern import MAX_LAYERS, parse, tile
from mm.model.context import Ctx
from mm.model.layer import (
    Backbone,
    Block,
    Caps,
    Layer,
    Linear,
    LinearFactory,
    Out,
    Provider,
    name_layers,
    zero_gradient_touch,
)
from mm.model.length_buckets import document_groups, stays_flat
from mm.model.linears.dense import dense
from mm.model.norm import Kind, norm
from mm.registry import BACKBONES, MIXERS, BlockField, FfnField, MixerField
from mm.state import State, StateTuple

INTERMEDIATE = "intermediate."


class Visits(Protocol):
    """One pass through a stack, as something that may change what goes on looks at it."""

    def see(self, visit: int, x_BTD: Tensor) -> Tensor:
        """What goes on after a visit that gave ``x``."""
        ...

    def result(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Sum]]:
        """What the last norm reads, and what is reported."""
        ...


class Stack(Backbone):
    """Blocks one after another, then a norm.

    ``path`` runs other layers or another order; every VISIT has its own State. Intermediates
    `hidden.i` (input of visit i) and `hidden` (what the heads read) are published under
    `intermediate.hidden.i`.
    """

    caps = Caps(shard="local")

    def __init__(
        self,
        layers: Sequence[Block],
        d_model: int,
        eps: float,
        recompute: str,
        last: Kind | Literal["none"] = "rms",
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if last == "none" else norm(last, d_model, eps)
        self.recompute = [recomputing.resolve_mode(recompute, layer) for layer in layers]
        self.providers = nn.ModuleDict()
        readers: dict[str, list[Layer]] = {}
        makers: dict[str, Callable[[int], Provider]] = {}
        for module in _own_modules(self.layers):
            if isinstance(module, Layer) and (wanted := module.provider()) is not None:
                name, makers[wanted[0]] = wanted
                module.provider_row = len(readers.setdefault(name, []))
                readers[name].append(module)
        for name, make in makers.items():
            if len(readers[name]) > 1:  # what one layer reads alone is no parameter of anything
                self.providers[name] = make(len(readers[name]))
        name_layers(self)

    @functools.cached_property
    def _takes_apart(self) -> bool:
        return any(getattr(m, "documents_apart", False) for m in self.layers.modules())

    def _layer(self, i: int) -> Block:
        return cast(Block, self.layers[i])

    def default_path(self) -> list[int]:
        """The layers of a pass that names none, in order."""
        return list(range(len(self.layers)))

    def watch(self, ctx: Ctx) -> Visits | None:
        """What looks at the outputs of the default path's layers; None: nobody does."""
        return None

    def init_weights(self) -> None:
        # Runs after the children: residual branches shrink with depth. Source: Radford et al. 2019
        # (GPT-2), section 2.3.
        factor = (2 * len(self.default_path())) ** -0.5
        for module in _own_modules(self.layers):
            if isinstance(module, Linear) and module.ends_branch:
                module.rescale(factor)

    def forward(
        self, x_BTD: Tensor, ctx: Ctx, state: State | None = None, path: Sequence[int] | None = None
    ) -> Out:
        visits = list(path) if path is not None else self.default_path()
        watch = self.watch(ctx) if path is None else None
        parts: list[State | None] = [None] * len(visits)
        if state is not None:
            if not isinstance(state, StateTuple) or len(state) != len(visits):
                raise ValueError(
                    f"a State of this path has {len(visits)} parts; make it with "
                    "initial_state(..., path=path)"
                )
            parts = list(state.parts)
        outer = ctx.provided
        made = {name: provider(ctx) for name, provider in self.providers.items()}
        ctx = replace(ctx, provided={**outer, **made})
        if any(layer._compiled_call_impl is not None for layer in self.layers):
            if self._takes_apart or not stays_flat(ctx.layout):
                document_groups(ctx)
            self.prefetch(ctx, state is not None)
        x, aux, intermediates = x_BTD, {}, {}
        if (
            made
        ):  # whoever reads them, if anybody does in this pass: gradients are zeros, not missing
            x = x + zero_gradient_touch(self.providers.parameters(), x)
        train = self.training and torch.is_grad_enabled()
        for visit, i in enumerate(visits):
            if f"hidden.{visit}" in ctx.return_intermediates:
                intermediates[f"{INTERMEDIATE}hidden.{visit}"] = x
            here = replace(ctx, visit=ctx.visit + visit)
            layer = self._layer(i)
            if train and self.recompute[i] != "none":
                out = recomputing.run(self.recompute[i], layer, x, here, parts[visit])
            else:
                out = layer(x, here, parts[visit])
            x, parts[visit] = out.y, out.state
            x = x if watch is None else watch.see(visit, x)
            ctx = replace(out.ctx, visit=ctx.visit) if out.ctx is not None else ctx
            for name, value in out.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        if watch is not None:
            x, more = watch.result(x)
            aux |= more
        y = self.norm(x)
        if intermediates or "hidden" in ctx.return_intermediates:
            intermediates |= (
                {f"{INTERMEDIATE}hidden": y} if "hidden" in ctx.return_intermediates else {}
            )
            ctx = replace(ctx, published={**ctx.published, **intermediates})
        after = StateTuple(*parts) if state is not None else None
        return Out(y, after, replace(ctx, provided=outer), aux)

    def initial_state(self, n: int, max_len: int, path: Sequence[int] | None = None) -> StateTuple:
        visits = path if path is not None else self.default_path()
        return StateTuple(*(self._layer(i).initial_state(n, max_len) for i in visits))


@BACKBONES.register("stack")
class StackConfig(Config):
    """``depth`` layers whose mixers follow ``pattern``.

    A word means, in this order: an entry of ``mixers``, a preset `configs/mixer/<word>.yaml`, a
    registered mixer kind. An
    entry of ``mixers`` without `kind` changes the preset or kind of its own name: `mixers:
    {attention: {kv_heads: 2}}`.
    """

    renamed: ClassVar[dict[str, str]] = {"channel": "ffn"}

    kind: Literal["stack"] = "stack"
    depth: Annotated[
        Annotated[int, Field(gt=0, le=MAX_LAYERS)] | None,
        Field(description="layers; the pattern is repeated; default: as it is written, once"),
    ] = None
    pattern: Annotated[
        str,
        Field(description="mixers from below, such as `2*rg_lru attention`: docs/mixers.md"),
    ] = "attention"
    mixers: dict[str, MixerField] = {}
    ffn: FfnField | None = Field(default="swiglu", validate_default=True)
    block: BlockField = Field(default="prenorm", validate_default=True)
    blocks: dict[str, BlockField] = Field(
        default={}, description="words of the pattern with a block of their own"
    )
    ffns: dict[str, FfnField | None] = Field(
        default={},
        description="words of the pattern with a feed-forward of their own; null: without one",
    )
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    norm: Kind | Literal["none"] = Field(default="rms", description="of what the heads read")
    recompute: recomputing.Recompute = "none"

    small = {
        "pattern": "attention rg_lru",
        "mixers": {"attention": {"kind": "attention", "heads": 2, "kv_heads": 1}},
    }

    @field_validator("mixers", mode="before")
    @classmethod
    def _extend_presets(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            word: yaml_config.merge(_raw(word), entry)
            if isinstance(entry, Mapping) and "kind" not in entry
            else entry
            for word, entry in value.items()
        }

    @model_validator(mode="after")
    def _known_words(self) -> StackConfig:
        try:
            words = self.words()
            for word in words:
                self.mixer(word)
            for name, given in (("blocks", self.blocks), ("ffns", self.ffns)):
                for word in given.keys() - {*words}:
                    raise UserError(f"{name}: '{word}' is no word of the pattern")
        except UserError as error:  # pydantic reports it with its path in the file
            raise ValueError(str(error)) from error
        return self

    def words(self) -> list[str]:
        """The mixer word of every layer."""
        return tile(parse(self.pattern), self.depth)

    def mixer(self, word: str) -> Config:
        """Config of the mixer that ``word`` names. Raises UserError with a suggestion."""
        if word in self.mixers:
            return self.mixers[word]
        try:
            return MIXERS.parse(_raw(word))
        except UserError:
            known = {*self.mixers, *presets(), *MIXERS}
            raise UserError(f"pattern: no mixer '{word}'{did_you_mean(word, known)}") from None

    def build(self, d_model: int, linear: LinearFactory = dense) -> Stack:
        return Stack(
            self.build_layers(d_model, linear), d_model, self.eps, self.recompute, self.norm
        )

    def build_layers(self, d_model: int, linear: LinearFactory) -> list[Block]:
        """The layers of `words`."""
        return [
            self.blocks.get(word, self.block).build(
                d_model,
                self.mixer(word).build(d_model, linear),
                ffn.build(d_model, linear) if (ffn := self.ffns.get(word, self.ffn)) else None,
            )
            for word in self.words()
        ]


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules below, but none of a Backbone inside, which sees to its own."""
    for child in module.children():
        if not isinstance(child, Backbone):
            yield child
            yield from _own_modules(child)


@functools.cache
def presets() -> tuple[str, ...]:
    """Names of the shipped mixer presets."""
    return tuple(sorted(path.stem for path in (yaml_config.SHIPPED / "mixer").glob("*.yaml")))


def _raw(word: str) -> dict[str, Any]:
    if word in presets():
        return yaml_config.read(f"mixer/{word}")
    if word in MIXERS:
        return {"kind": word}
    raise UserError(f"no mixer preset or kind '{word}'{did_you_mean(word, {*presets(), *MIXERS})}")
