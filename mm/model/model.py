"""The language model: embed, run the backbone, read the heads. `Model.forward` is the only door.

B rows, T tokens, S streams, D model, P places, G items, N slots.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Batch, Sum
from mm.config import Config, validate
from mm.errors import UserError
from mm.layout import Layout
from mm.mask import Causal, Full, Mask, Prefix, Window
from mm.model import folder as files
from mm.model import mup
from mm.model.backbones.stack import INTERMEDIATE
from mm.model.context import Ctx, Memory
from mm.model.fill import fill
from mm.model.layer import (
    NONE,
    Backbone,
    Embedder,
    Head,
    HeadOut,
    ModelOut,
    hand_back,
    name_layers,
)
from mm.model.padding import move_padding_last, restore_order
from mm.registry import (
    BACKBONES,
    NETWORKS,
    AdapterField,
    BackboneField,
    EmbedderField,
    HeadField,
    LinearField,
)
from mm.state import State, StateTuple
from mm.vocabulary import RESERVED, Vocabulary


class Model(nn.Module):
    """Embedder and adapters, backbone, heads.

    Every parameter is used inside its own module's forward (ZeRO-3).
    """

    def __init__(
        self,
        config: LmConfig,
        vocabulary: Vocabulary,
        embedder: Embedder,
        adapters: Mapping[str, nn.Module],
        backbone: Backbone,
        heads: Mapping[str, Head],
    ):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedder = embedder
        self.adapters = nn.ModuleDict(adapters)
        config.check_adapters(vocabulary)
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self._tie()
        name_layers(self)
        backbone.check_mask(config.default_mask())

    def init_weights(self) -> None:
        if self.config.mup_base is not None:
            mup.rescale(self, self.config.mup_base, self.config.d_model)

    def rates(self) -> dict[str, float]:
        """Multiple of the learning rate of each parameter; {}: the same for all."""
        if self.config.mup_base is None:
            return {}
        return mup.rates(self, self.config.mup_base, self.config.d_model)

    def _tie(self) -> None:
        for head in self.heads.values():
            assert isinstance(head, Head)
            if head.tied:
                head.tie(self.embedder)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # to_empty and moves off the meta device make a new Parameter for every module that holds
        # one.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(
        self,
        batch: Batch,
        *,
        state: State | None = None,
        mask: Mask | None = None,
        memories: Mapping[str, Memory] = NONE,
        scheduled: Mapping[str, float] = NONE,
        return_intermediates: frozenset[str] = frozenset(),
        seed: Tensor | int = 0,
        draft: bool = False,
        path: Sequence[int] | None = None,
        heads: Sequence[str] | None = None,
        loss: bool = True,
    ) -> ModelOut:
        """Run the model.

        Args:
            batch: ids `(B, T, S)`; ``batch.places[head]`` `(P,)` says where each head predicts
                (default every place).
            state: of `initial_state`; consumed, the successor is in the result. None = whole
                documents, no State.
            mask: who sees whom; default the config's.
            memories: further things to attend to; every part of the batch enters as one under its
                own name.
            return_intermediates: intermediates, e.g. "hidden", "hidden.3" (input of layer 3).
            draft: the returned State must be able to `accept` a prefix.
            path: layers to run, in order.
            heads: names of the heads to run; default all.
            loss: True: heads return nll per place of ``batch.targets``; False: Distributions.
        Returns:
            `hidden` `(B, T, D)`, one HeadOut a head, state, intermediates, aux.
        """
        tapped = [h for h in self.heads if heads is None or h in heads]
        taps_read = {str(self.heads[h].reads) for h in tapped} - {"hidden"}
        layout, shard = batch.layout, batch.shard
        mask = mask or self.config.default_mask()
        if shard is None:
            layout = _with_fields(layout, mask)
        else:
            shard, layout = shard.with_fields(lambda of, ids: _with_fields(of, mask), layout)
        ctx = Ctx(
            layout,
            mask,
            batch.ids,
            scheduled=scheduled,
            return_intermediates=return_intermediates | frozenset(taps_read),
            seed=seed,
            draft=draft,
            shard=shard,
        )
        parts = {
            name: Memory(
                part.layout,
                Full(),
                self.embedder(part.ids, replace(ctx, layout=part.layout, ids=part.ids)),
            )
            for name, part in batch.parts.items()
        }
        ctx = replace(ctx, memories={**parts, **memories})
        x = self.embedder(batch.ids, ctx)
        aux: dict[str, Sum] = {}
        inner, back = ctx, None
        # Each rank runs each adapter, whatever its rows hold; a step of decoding holds no values.
        if len(self.adapters) and (batch.values or state is None):
            x, inner = fill(x, batch, ctx, self.adapters, self.embedder, aux)
            if inner is not ctx:
                ctx = inner
                x, inner, back = move_padding_last(x, ctx)
        out = self.backbone(x, inner, state, path)
        aux |= out.aux
        shared = out.ctx.published if out.ctx is not None else {}
        intermediates = {
            k.removeprefix(INTERMEDIATE): v for k, v in shared.items() if k.startswith(INTERMEDIATE)
        }
        hidden = out.y
        if back is not None:
            hidden, intermediates = (
                restore_order(hidden, back),
                {k: restore_order(v, back) for k, v in intermediates.items()},
            )
        found: dict[str, HeadOut] = {}
        for name in tapped:
            head = self.heads[name]
            places = batch.places.get(name)
            if places is None:
                places = torch.arange(
                    batch.ids.shape[0] * batch.ids.shape[1], device=batch.ids.device
                )
            target = batch.targets.flatten(0, 1).index_select(0, places.long()) if loss else None
            if target is not None and name not in batch.places:
                target = target.clamp_min(0)  # -1 = none: its weight is 0
            h = hidden if head.reads == "hidden" else intermediates[str(head.reads)]
            found[name] = head(h, ctx, places, target)
            aux |= {f"heads.{name}.{k}": v for k, v in found[name].aux.items()}
        return ModelOut(
            hidden,
            found,
            out.state,
            {k: v for k, v in intermediates.items() if k in return_intermediates},
            aux,
        )

    def initial_state(self, n: int, max_len: int, path: Sequence[int] | None = None) -> StateTuple:
        """State of ``n`` fresh slots for documents of at most ``max_len`` tokens."""
        if path is None:
            return self.backbone.initial_state(n, max_len)  # type: ignore[return-value]
        return self.backbone.initial_state(n, max_len, path=path)  # type: ignore[call-arg]

    def state_bytes(self, n: int, max_len: int) -> int:
        """Declared bytes of `initial_state`."""
        return self.backbone.state_bytes(n, max_len)

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Hand globally summed statistics to the modules that reported them."""
        hand_back(self, stats)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        vocabulary: Vocabulary | None = None,
        tokenizers: Mapping[str, str | Path] = NONE,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a folder that needs nothing else: config, weights, vocabulary, tokenizers.

        Args:
            folder: replaced as a whole by one rename.
            vocabulary: default the one that the model was built with.
            tokenizers: modality -> folder of a saved tokenizer.
            tensors: the state dict to store; default this module's own (a ZeRO-3 engine passes
                gathered ones).
        """
        with files.whole(folder) as temporary:
            files.write_config(temporary, self.config.to_dict())
            files.save_tensors(
                temporary / "model.safetensors", self.state_dict() if tensors is None else tensors
            )
            (vocabulary or self.vocabulary).save(temporary / "vocabulary.json")
            for modality, source in tokenizers.items():
                shutil.copytree(source, temporary / "tokenizers" / modality)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Model:
        """Read what `save_pretrained` wrote, on the CPU, in eval mode.

        Raises UserError naming the file that is wrong.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        values = files.read_config(folder)
        if values.get("kind") != "lm":
            raise UserError(f"{folder}: a saved '{values.get('kind')}', not a language model")
        config = validate(LmConfig, values, str(folder / "config.json"))
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        model = files.load_into(lambda: config.build(vocabulary), folder / "model.safetensors")
        assert isinstance(model, Model)
        return model.eval()


def _with_fields(layout: Layout, mask: Mask) -> Layout:
    """A layout with the named fields that a mask asks for."""
    if layout.fields.extra and isinstance(mask, Causal | Full | Window):
        # These read no named field: none is cached, or regrouped with each layer.
        return layout.map_fields(lambda f: f._replace(extra={}))
    name = mask.atomic
    if name and name not in layout.fields.extra:  # nobody has a prefix
        zeros = lambda f: {**f.extra, name: torch.zeros_like(f.document)}
        return layout.map_fields(lambda f: f._replace(extra=zeros(f)))
    return layout


@NETWORKS.register("lm")
class LmConfig(Config):
    """A language model over the shared vocabulary, whose size sets the table's."""

    kind: Literal["lm"] = "lm"
    d_model: Annotated[
        int, Field(gt=0, le=2**20, description="width of the vectors between layers")
    ] = 128
    backbone: BackboneField = Field(default="stack", validate_default=True)
    embedder: EmbedderField = Field(default="sum", validate_default=True)
    adapters: dict[str, AdapterField] = {}
    heads: dict[str, HeadField] = Field(default={"tokens": "softmax"}, validate_default=True)
    linear: LinearField = Field(default="dense", validate_default=True)
    mask: Literal["causal", "full", "prefix"] = Field(
        default="causal",
        description="prefix: causal, but leading conditions see each other both ways",
    )
    mup_base: int | None = Field(
        None,
        gt=0,
        description="muP: width whose learning rate serves all; widen by more heads, "
        "not wider ones",
    )
    code_init: bool = Field(
        default=True, description="start embedding rows from the tokenizers' code vectors"
    )

    @model_validator(mode="after")
    def _mup_reads_out_alone(self) -> LmConfig:
        if self.mup_base is not None and any(
            getattr(h, "tied", False) for h in self.heads.values()
        ):
            raise ValueError("mup_base needs heads of their own: set heads.*.tied to false")
        return self

    def check_adapters(self, vocabulary: Vocabulary) -> None:
        """Raise UserError where values of the vocabulary have no adapter that fits them."""
        for name, n in ((s.modality, s.n_features) for s in vocabulary.ranges if s.continuous):
            if name not in self.adapters:
                raise UserError(
                    f"model.adapters has none for '{name}', which is read as values: set "
                    f"model.adapters={{{name}: {{kind: linear, d_in: {n}}}}}"
                )
            if (have := self.adapters[name].d_in) != n:
                raise UserError(
                    f"model.adapters.{name} reads {have} features a place, the data have {n}: set "
                    "it to what its tokenizer gives"
                )

    def default_mask(self) -> Mask:
        """The Mask of a pass that names none."""
        return {"causal": Causal(), "full": Full(), "prefix": Prefix()}[self.mask]

    def build(self, vocabulary: Vocabulary | None = None) -> Model:
        """Allocate the model; `mm.model.layer.init_weights` fills it.

        Without a vocabulary: 256 byte ids.
        """
        n_ids = vocabulary.size if vocabulary is not None else RESERVED + 256
        return Model(
            self,
            vocabulary or Vocabulary(),
            self.embedder.build(n_ids, self.d_model),
            {name: adapter.build(self.d_model) for name, adapter in self.adapters.items()},
            self.backbone.build(self.d_model, self.linear.build),
            {name: head.build(self.d_model, n_ids) for name, head in self.heads.items()},
        )

    def prepare(self, module: nn.Module, code_vectors: Mapping[str, np.ndarray]) -> None:
        """Seed embedding rows so that alike codes begin alike.

        Called once on a fresh start, all ranks alike.

        Rows are a fixed random projection of the standardised code vectors, plus 3 % of
        variance of their own, so that
        equal vectors (dead codes, codes of other books) can still be told apart.

        Args:
            module: the built and initialised `Model`.
            code_vectors: modality -> `(n_ids, C)` float array, as `ModalityTokenizer.code_vectors`
                gives.
        """
        if not self.code_init:
            return
        assert isinstance(module, Model)
        weight = module.embedder.weight
        for modality, vectors in code_vectors.items():
            span = module.vocabulary.range(modality)
            spec = module.vocabulary.spec(modality)
            books = np.asarray(vectors, np.float32).reshape(spec.n_codebooks, spec.vocab_size, -1)
            books = books - books.mean(1, keepdims=True)
            books = books / np.maximum(np.sqrt((books**2).mean((1, 2), keepdims=True)), 1e-8)
            flat = books.reshape(spec.n_ids, -1)
            C = flat.shape[1]
            rng = np.random.default_rng([17, span.index])
            rows = (
                flat
                @ rng.standard_normal((C, self.d_model)).astype(np.float32)
                / np.sqrt(C * self.d_model)
            )
            with torch.no_grad():
                new = torch.from_numpy(rows).to(weight)
                own = weight[span.first : span.stop]
                weight[span.first : span.stop] = 0.97**0.5 * new + 0.03**0.5 * own

    small = {"d_model": 16, "backbone": BACKBONES.get("stack").smallest()}
