"""What a config trains, without its memory: fake networks, and a micro-batch of its own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm.batch import Batch
from mm.data.batching.codebooks import CODES
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.sequence import Unconnected
from mm.objectives.objective import Objective
from mm.plan.networks import Networks
from mm.plan.trace import Trace, fake_mode, to_dtype, trace_step
from mm.run import Run
from mm.specs import NONE, TokenSpec
from mm.trainer.engine.deepspeed import linear_of_stage
from mm.trainer.env import TrainerEnv
from mm.trainer.sequence import SequenceGroup, require_shares
from mm.trainer.stage import all_networks, build, make_stream
from mm.trainer.trainable import set_trainable
from mm.vocabulary import Vocabulary, extend_vocabulary

CPU = torch.device("cpu")
IDS = 32_000  # of a vocabulary that is not there


@dataclass(frozen=True)
class Assumed:
    """What stands for data that are not there: rows of equal documents."""

    document: int  # tokens
    ids: int = IDS


@dataclass
class Subject:
    """One stage of a run, to be traced with micro-batches of any number of rows.

    Attributes:
        index: of the stage.
        assumed: what stands for its data; None: they are read.
    """

    run: Run
    index: int
    objective: Objective
    vocabulary: Vocabulary | None
    precision: str
    assumed: Assumed | None

    @property
    def data(self) -> Any:
        return self.run.stages[self.index].data

    @property
    def sequence(self) -> int:
        """Processes that share each row."""
        return self.run.engine.sequence

    def with_recompute(self, mode: str) -> Subject:
        """The same with another recomputation of the backbone."""
        backbone = self.run.model.backbone.model_copy(update={"recompute": mode})
        model = self.run.model.model_copy(update={"backbone": backbone})
        return replace(self, run=self.run.model_copy(update={"model": model}))

    def batches(self, rows: int) -> list[Batch]:
        """A micro-batch of ``rows`` rows of the data, after the objective's corruption."""
        if self.assumed is not None:
            length = getattr(self.data, "seq_len", None) or self.assumed.document
            heads = getattr(self.run.model, "heads", {})
            encodes = getattr(getattr(self.run.model, "backbone", None), "encodes", False)
            made = documents(rows, length, self.assumed.document, self.vocabulary, heads)
            return [half_given(made) if encodes else made]
        changed = {"batch_size": rows, "micro_batch_size": None, "prefetch": 0}
        have = {k: v for k, v in changed.items() if k in type(self.data).model_fields}
        stage = self.run.stages[self.index]
        stage = stage.model_copy(update={"data": self.data.model_copy(update=have)})
        stages = list(self.run.stages)
        stages[self.index] = stage
        run = self.run.model_copy(update={"stages": tuple(stages)})
        stream = make_stream(run, self.index, self.objective, self.vocabulary)
        try:
            micros = stream.next()
        finally:
            stream.close()
        return micros[:1]

    def networks(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Networks that train, and the others; call under a fake mode."""
        trained: dict[str, nn.Module] = {}
        frozen: dict[str, nn.Module] = {}
        for name, network in all_networks(self.run, self.objective).items():
            module = build(network.config, vocabulary=self.vocabulary)
            require_shares(self.run, self.index, self.objective, module, name)
            if self.precision == "bf16":
                to_dtype(module, torch.bfloat16)
            if network.mode == "train":
                stage, key = self.run.stages[self.index], f"stages.{self.index}"
                set_trainable(module, stage, key, name, self.vocabulary)
                trained[name] = module.train()
            else:
                frozen[name] = module.eval().requires_grad_(False)
        return trained, frozen

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the State of one sequence in generation; 0 of a network without one."""
        with fake_mode():
            declared = getattr(self.networks()[0].get("model"), "state_bytes", None)
            return int(declared(1, tokens)) if declared is not None else 0

    def trace(self, batch: Batch, zero_stage: int) -> tuple[Trace, Networks]:
        """Trace one micro-batch, and describe the networks.

        Of several processes that share its rows it is the second, which gets and passes states.
        """
        env = TrainerEnv(self.run.seed, CPU, self.precision)
        scheduled = self.objective.scheduled(1, np.random.default_rng(0))
        env.begin(1, scheduled)
        # a layout of its own: what layers remember of it here has no content
        batch, group = replace(batch, layout=replace(batch.layout)), Unconnected()
        if self.sequence > 1:
            batch = SequenceGroup(1, self.sequence, group).split(batch)
        batch = self.objective.corrupt(batch, env.rng, scheduled)
        env.know([batch])
        with fake_mode() as fake:
            trained, frozen = self.networks()
            described = Networks.of(self.run.stages[self.index].optimizer, trained, frozen)

        def call(module: nn.Module) -> Any:
            def run(b: Batch, **kw: Any) -> Any:
                with env.autocast():
                    return module(b, **{"scheduled": scheduled, "seed": 1, **kw})

            return run

        env.lend({k: _Raw(m) for k, m in trained.items()}, frozen)  # type: ignore[arg-type]
        nets = {name: call(module) for name, module in (trained | frozen).items()}

        def losses() -> Iterator[Tensor]:
            for term in self.objective.terms([batch], nets, env):
                yield torch.stack([s for s in term.losses.values()]).sum()

        tokens = int((batch.layout.fields.document > 0).sum())
        linear = linear_of_stage(zero_stage)
        trace = trace_step(fake, trained, losses, tokens, linear)
        return replace(trace, passed=group.sent), described


@dataclass(frozen=True)
class _Raw:
    """What `TrainerEnv.frozen` asks of an engine."""

    raw: nn.Module


def open_subject(run: Run, index: int, precision: str, assumed: Assumed | None) -> Subject:
    """Open a stage.

    Raises UserError where its data are not there and nothing is assumed instead.
    """
    if assumed is not None:
        vocabulary = _assumed_vocabulary(run, index, assumed.ids)
    else:
        try:
            vocabulary = Vocabulary.load(run.vocabulary) if run.vocabulary is not None else None
        except UserError as error:
            raise UserError(
                f"{error}; to plan without the data: mm plan CONFIG --document TOKENS --ids N"
            ) from error
    objective = build(run.stages[index].objective, vocabulary=vocabulary)
    return Subject(run, index, objective, vocabulary, precision, assumed)


def _assumed_vocabulary(run: Run, index: int, ids: int) -> Vocabulary | None:
    """Ids of the modalities that the config names, one modality where it names none."""
    if run.vocabulary is None and not getattr(run.stages[index].data, "token_sources", None):
        return None
    stage = run.stages[index]
    transform = getattr(stage.objective, "transform", None)
    tasks = getattr(transform, "tasks", None) or {}
    named = {m for task in tasks for m in task.replace(">", "+").split("+")}
    named |= {*run.tokenizers, *stage.train_rows, *getattr(stage.objective, "weights", {})}
    modalities = sorted(named) or ["text"]
    each = max(1, ids // len(modalities))
    return extend_vocabulary([TokenSpec(m, each, fingerprint=f"assumed {m}") for m in modalities])


def half_given(batch: Batch) -> Batch:
    """The same with the first half of every document as conditions."""
    known = batch.layout.arrays()
    half = torch.from_numpy(np.append(0, known.length // 2)[known.document])
    mark = lambda f: f._replace(
        extra={"prefix": (f.position[..., 0].flatten() < half).int().view(f.document.shape)}
    )
    return replace(batch, layout=batch.layout.map_fields(mark))


def documents(
    rows: int,
    length: int,
    document: int,
    vocabulary: Vocabulary | None,
    heads: Mapping[str, Any] = NONE,
) -> Batch:
    """A micro-batch of equal documents of ids, every place a target.

    ``heads`` with targets of their own (configs by name) have one at the start of each document;
    one of further codebooks has all of them at every place.
    """
    document = min(document, length)
    row = [Doc(document)] * (length // document)
    if rest := length % document:
        row.append(Doc(rest))
    layout = Layout.from_rows([row] * rows, length)
    n = vocabulary.size if vocabulary is not None else 256
    first = min(n - 1, 18)  # codes of the first modality
    ids = torch.full((rows, length, 1), first, dtype=torch.int32)
    places = {"tokens": torch.arange(rows * length, dtype=torch.int32)}
    if delays := getattr(heads.get(CODES), "delays", {}):
        assert vocabulary is not None
        m = max(delays, key=lambda m: len(delays[m]))
        own, size = vocabulary.range(m), vocabulary.spec(m).vocab_size
        codes = own.first + size * torch.arange(len(delays[m]), dtype=torch.int32)
        ids = codes.expand(rows, length, -1).contiguous()
        places[CODES] = places["tokens"]
    one = torch.ones(rows, length, dtype=torch.int32)
    labels = {"target_modality": one}
    made = {name: head.example for name, head in heads.items() if hasattr(head, "example")}
    starts = layout.cu_seqlens[:-1]
    return Batch(
        layout,
        ids,
        ids,
        torch.ones(rows, length),
        places | dict.fromkeys(made, starts),
        labels=labels,
        head_targets={name: example(len(starts)) for name, example in made.items()},
    )
