"""The language model: embed, run the backbone, read the heads. `Model.forward` is the only door.

B rows, T tokens, S streams, D model, P places, G items, N slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Batch, Sum, add_sums
from mm.config import Config, validate
from mm.errors import UserError
from mm.mask import Mask
from mm.mask_expression import parse_mask
from mm.model import folder as files
from mm.model import mup
from mm.model.backbones.stack import INTERMEDIATE
from mm.model.code_rows import seed_rows
from mm.model.context import Ctx, Memory
from mm.model.fill import embed_part, fill, require_adapters
from mm.model.hand_back import hand_back
from mm.model.items import with_fields
from mm.model.layer import (
    NONE,
    Backbone,
    Embedder,
    Head,
    HeadOut,
    Linear,
    ModelOut,
    name_layers,
)
from mm.model.memories import check_memories, fields_read
from mm.model.padding import move_padding_last, moved_places, restore_order
from mm.model.start_state import StartConfig, StartState
from mm.model.stateful import Stateful
from mm.registry import (
    BACKBONES,
    NETWORKS,
    AdapterField,
    BackboneField,
    EmbedderField,
    HeadField,
    LinearField,
)
from mm.state import State, StateTuple, join_parts, parts_of
from mm.vocabulary import RESERVED, Vocabulary


class Model(nn.Module):
    """Embedder and adapters, backbone, heads; each uses its parameters in its forward (ZeRO-3)."""

    def __init__(
        self,
        config: LmConfig,
        vocabulary: Vocabulary,
        embedder: Embedder,
        adapters: Mapping[str, nn.Module],
        backbone: Backbone,
        heads: Mapping[str, Head],
        start: StartState | None = None,
    ):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedder = embedder
        self.adapters = nn.ModuleDict(adapters)
        config.check_adapters(vocabulary)
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.start = start
        self._tie()
        name_layers(self)
        try:
            self.mask = config.make_mask(vocabulary)
        except ValueError as error:  # a modality that the vocabulary lacks
            raise UserError(f"model.{error}") from None
        for part in self.modules():
            if isinstance(part, Linear):
                part.read_vocabulary(vocabulary)
        backbone.check_mask(self.mask)
        check_memories(backbone, config.parts)
        self.fields_read = fields_read(backbone)

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
            head.vocabulary = self.vocabulary
            if head.tied:
                head.tie(self.embedder)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # to_empty and moves off the meta device make a new Parameter for every holder of one.
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
        mask = mask or self.mask
        fields = lambda of, ids: with_fields(of, mask, self.fields_read, ids, self.vocabulary)
        layout, shard = batch.layout, batch.shard
        if shard is None:
            layout = fields(layout, batch.ids)
        else:
            shard, layout = shard.with_fields(fields, layout)
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
        aux: dict[str, Sum] = {}
        more = self.adapters, self.embedder, aux
        parts = {name: embed_part(part, ctx, *more) for name, part in batch.parts.items()}
        ctx = replace(ctx, memories={**parts, **memories})
        serving, stateful = state is not None, self._stateful_parts()
        state, *others = parts_of(state, 1 + len(stateful))
        carried = dict(zip(stateful, others, strict=True))
        x, after, _, reported = self.embedder(batch.ids, ctx, carried.get("embedder"))
        carried |= {"embedder": after} if "embedder" in carried else {}
        add_sums(aux, reported)
        inner, back = ctx, None
        # Each rank runs each adapter, whatever its rows hold; a step of decoding holds no values.
        if len(self.adapters) and (batch.values or not serving):
            x, inner = fill(x, batch, ctx, *more)
            if inner is not ctx:
                ctx = inner
                x, inner, back = move_padding_last(x, ctx)
        run = self.backbone if self.start is None else partial(self.start.run, self.backbone)
        out = run(x, inner, state, path)
        add_sums(aux, out.aux)
        shared = out.ctx.published if out.ctx is not None else {}
        intermediates = {
            k.removeprefix(INTERMEDIATE): v for k, v in shared.items() if k.startswith(INTERMEDIATE)
        }
        seen = {"hidden": out.y, **intermediates}  # by heads, in the order of the layers
        hidden = out.y
        if back is not None:
            hidden, intermediates = (
                restore_order(hidden, back),
                {k: restore_order(v, back) for k, v in intermediates.items()},
            )
        found: dict[str, HeadOut] = {}
        for name in tapped:
            head = self.heads[name]
            assert isinstance(head, Head)
            key = name if name in batch.places else head.predicts
            places, target = batch.places.get(key), batch.head_targets.get(key)
            if loss and target is None and not head.predicts_ids and key not in batch.places:
                continue  # of this stage's data none has a target for it, on any rank
            if places is None:
                places = torch.arange(
                    batch.ids.shape[0] * batch.ids.shape[1], device=batch.ids.device
                )
            if target is None:
                target = batch.targets.flatten(0, 1).index_select(0, places.long())
                if key not in batch.places:
                    target = target.clamp_min(0)  # -1 = none: its weight is 0
            if back is not None:
                places = moved_places(places, back)
            whole, given = f"heads.{name}", target if loss else None
            found[name] = head(seen[str(head.reads)], inner, places, given, carried.get(whole))
            # Layers inside a head report by their whole name.
            aux |= {f"{whole}.{k.removeprefix(f'{whole}.')}": v for k, v in found[name].aux.items()}
            if whole in carried:
                carried[whole] = found[name].state
        if serving and stateful:
            out = out._replace(state=join_parts(out.state, *carried.values()))
        return ModelOut(
            hidden,
            found,
            out.state,
            {k: v for k, v in intermediates.items() if k in return_intermediates},
            aux,
        )

    def initial_state(self, n: int, max_len: int, path: Sequence[int] | None = None) -> StateTuple:
        """State of ``n`` fresh slots for documents of at most ``max_len`` tokens.

        That of the backbone, and of the embedder and the heads that have one.
        """
        more: dict[str, Any] = {} if path is None else {"path": path}
        max_len += self.start.length if self.start is not None else 0
        own = [p.initial_state(n, max_len) for p in self._stateful_parts().values()]
        return join_parts(self.backbone.initial_state(n, max_len, **more), *own)  # type: ignore

    def state_bytes(self, n: int, max_len: int) -> int:
        """Declared bytes of `initial_state`."""
        max_len += self.start.length if self.start is not None else 0
        own = sum(p.state_bytes(n, max_len) for p in self._stateful_parts().values())
        return self.backbone.state_bytes(n, max_len) + own

    def _stateful_parts(self) -> dict[str, Stateful]:
        """The embedder and the heads that have a State, by qualified name."""
        named = {"embedder": self.embedder} | {f"heads.{n}": h for n, h in self.heads.items()}
        return {n: p for n, p in named.items() if isinstance(p, Stateful) and p.stateful_parts()}

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
            tensors: the state dict to store, each read when its turn has come; default this
                module's own. With it the module may be on the meta device.
        """
        own = self.state_dict(keep_vars=True)
        values, words = self.config.to_dict(), vocabulary or self.vocabulary
        files.save_model(folder, values, tensors or own, words, tokenizers, own)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Model:
        """Read what `save_pretrained` wrote, on the CPU, in eval mode.

        Raises UserError naming the file that is wrong.
        """
        folder = files.model_folder(Path(folder))
        values = files.read_config(folder)
        if values.get("kind") != "lm":
            raise UserError(f"{folder}: a saved '{values.get('kind')}', not a language model")
        config = validate(LmConfig, values, str(folder / "config.json"))
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        model = files.load_into(lambda: config.build(vocabulary), folder)
        assert isinstance(model, Model)
        return model.eval()


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
    mask: str = Field(
        default="causal",
        description="causal, full, prefix (causal, but leading conditions see each other both "
        "ways), or an expression of fields: docs/how-to/masks.md",
    )
    mask_fields: tuple[str, ...] = Field(
        default=(), description="named fields of the data's own that the mask may read"
    )
    start: StartConfig | None = Field(
        default=None, description="what documents begin from, learned: state, prefix, prompt"
    )
    parts: tuple[str, ...] = Field(
        default=(), description="second sequences of the batches that layers attend to by name"
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

    @model_validator(mode="after")
    def _mask_is_read(self) -> LmConfig:
        self.make_mask(None)
        return self

    def needs_whole_documents(self, mask: str | None = None) -> str | None:
        """What of a document no call may cut, under a mask or the own one; None: nothing."""
        mask = mask or self.mask
        if mask not in ("causal", "full"):
            return "a prefix is read" if mask == "prefix" else "what its mask shows is read"
        return "conditions are encoded" if getattr(self.backbone, "encodes", False) else None

    def check_adapters(self, vocabulary: Vocabulary) -> None:
        """Raise UserError where values of the vocabulary have no adapter that fits them."""
        require_adapters(self.adapters, self.heads, vocabulary)

    def make_mask(self, vocabulary: Vocabulary | None) -> Mask:
        """The Mask of a pass that names none.

        Raises ValueError where it names a field or a modality that is not there.
        """
        return parse_mask(self.mask, vocabulary and vocabulary.numbers, self.mask_fields)

    def build(self, vocabulary: Vocabulary | None = None) -> Model:
        """Allocate the model; `mm.model.layer.init_weights` fills it.

        Without a vocabulary: 256 byte ids.
        """
        n_ids = vocabulary.size if vocabulary is not None else RESERVED + 256
        known = vocabulary or Vocabulary()
        backbone = self.backbone.build(self.d_model, self.linear.build)
        return Model(
            self,
            known,
            self.embedder.build(n_ids, self.d_model, known),
            {name: adapter.build(self.d_model) for name, adapter in self.adapters.items()},
            backbone,
            {name: head.build(self.d_model, n_ids) for name, head in self.heads.items()},
            self.start.build(backbone, self.d_model) if self.start is not None else None,
        )

    def prepare(self, module: nn.Module, code_vectors: Mapping[str, np.ndarray]) -> None:
        """Seed embedding rows so that alike codes begin alike.

        Called once on a fresh start, all ranks alike. Rows are a fixed random projection of the
        standardised code vectors, plus 3 % of variance of their own, so that equal vectors (dead
        codes, other books) can still be told apart.

        Args:
            module: the built and initialised `Model`.
            code_vectors: modality -> `(n_ids, C)` float array, as `ModalityTokenizer.code_vectors`
                gives.
        """
        if not self.code_init:
            return
        assert isinstance(module, Model)
        seed_rows(module.embedder.rows_of, module.vocabulary, code_vectors)

    small = {"d_model": 16, "backbone": BACKBONES.get("stack").smallest()}
