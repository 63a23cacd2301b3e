"""What a run is checked for before its first step: every input that a later hour would ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from mm.data.shards.reader import ShardSet
from mm.decoders.device import warn_of_driver
from mm.errors import UserError
from mm.launch import environment
from mm.run import Run
from mm.trainer import begun, chat, folder
from mm.trainer import survey as figures
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.env import TrainerEnv
from mm.trainer.stage import StageState, build, make_stream
from mm.vocabulary import Vocabulary


class Starting(Training, Protocol):
    """What the checks need of the trainer."""

    callbacks: list[Callback]
    env: TrainerEnv

    @property
    def stage(self) -> StageState: ...


def first_stage(ends: Sequence[int], step: int) -> int:
    """Number of the stage that a run with ``step`` steps done goes on in.

    Args:
        ends: steps of the run at the end of each stage.
    """
    return next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)


def check(trainer: Starting, index: int) -> None:
    """Check vocabulary, tokenizers, tasks and callbacks. Main rank.

    Args:
        index: of the first stage that will train.
    Raises:
        UserError: naming the key, what it names and what mends it.
    """
    run, vocabulary = trainer.run, trainer.vocabulary
    warn_of_driver("training on the CPU")
    for number in range(index, len(run.stages)):
        check_shards(f"stages.{number}.data", run.stages[number].data, run, vocabulary)
    check_tokenizers(trainer, vocabulary)
    chat.check_templates(trainer, index)
    for number in range(index, len(run.stages)):
        for place, task in enumerate(run.stages[number].tasks):
            if not (run.evaluate or getattr(task, "every", 0)):  # it is never measured
                continue
            try:
                task.check(vocabulary, trainer.tokenizers)
            except UserError as error:
                raise UserError(f"stages.{number}.tasks.{place} ({task.kind}): {error}") from error
    for sink in run.tracking.sinks:
        sink.check()
    for callback in trainer.callbacks:
        callback.check(trainer)


def token_sources(data: Any) -> Iterator[tuple[str, ShardSet]]:
    """(path, shards) of every source of a stream of token documents."""
    for source in getattr(data, "token_sources", ()):
        yield str(source.path), source.build()


def check_shards(key: str, data: Any, run: Run, vocabulary: Vocabulary | None) -> None:
    """Check that the run's vocabulary is the one that the shards of a stage were made with.

    Raises UserError naming the modality, both fingerprints and the key to set.
    """
    for path, shards in token_sources(data):
        have = {spec.modality: spec for spec in (vocabulary.ranges if vocabulary else ())}
        for spec in shards.specs:
            mine = have.get(spec.modality)
            if vocabulary is None or mine == spec:
                continue
            what = (
                f"has no modality '{spec.modality}'"
                if mine is None
                else f"has '{spec.modality}' of tokenizer {mine.fingerprint[:12]} with "
                f"{mine.n_ids} ids"
            )
            raise UserError(
                f"vocabulary {run.vocabulary} {what}; the shards of {key} at {path} were made by "
                f"{spec.fingerprint[:12]} with {spec.n_ids} ids: set "
                f"vocabulary={path}/vocabulary.json, or pack again with: mm data pack SRC --out "
                f"DIR --tokenizers ... --vocabulary {run.vocabulary}"
            )


def check_tokenizers(trainer: Training, vocabulary: Vocabulary | None) -> None:
    """Check that each of ``tokenizers:`` is the one that the vocabulary was made with.

    Raises UserError naming the modality, both fingerprints and the key to set.
    """
    run = trainer.run
    for modality, tokenizer in trainer.tokenizers.items():
        spec, key = tokenizer.spec, f"tokenizers.{modality}"
        path = run.tokenizers[modality]
        if spec.modality != modality:
            raise UserError(
                f"{key}: {path} is a tokenizer of '{spec.modality}'; write it as "
                f"tokenizers.{spec.modality}={path}"
            )
        if vocabulary is None:
            continue
        if modality not in vocabulary.modalities:
            raise UserError(
                f"{key}: the vocabulary {run.vocabulary} has no '{modality}', only "
                f"{', '.join(vocabulary.modalities)}; leave {key} out, or pack with it: mm data "
                "pack SRC --out DIR --tokenizers ..."
            )
        have = vocabulary.spec(modality)
        if have != spec:
            raise UserError(
                f"{key}: {path} is tokenizer {spec.fingerprint[:12]} ({spec.n_ids} ids), the "
                f"vocabulary {run.vocabulary} was made with {have.fingerprint[:12]} "
                f"({have.n_ids} ids): set {key} to that one, or pack the data again with this one: "
                "mm data pack SRC --out DIR --tokenizers ..."
            )


def describe(trainer: Starting, init_from: Mapping[str, Any] | None) -> dict[str, Any]:
    """`environment.json`: what the run is made with and begins from."""
    facts: dict[str, Any] = {
        "device": str(trainer.device),
        "world": environment.ranks().world,
        "precision": trainer.env.precision,
        "threads": torch.get_num_threads(),
    }
    if init_from is not None:
        facts["init_from"] = dict(init_from)
    return folder.describe(trainer.run, facts)


def survey(trainer: Starting, index: int) -> dict[str, Any]:
    """Tell what the run will train on; print it. Main rank, with the first stage built.

    Raises UserError where a stage leaves out more than it allows.
    """
    run, words = trainer.run, trainer.vocabulary
    found: dict[str, Any] = {
        "parameters": dict(trainer.stage.parameters),
        "trained": dict(trainer.stage.trained),
        "device": str(trainer.device),
        "precision": trainer.env.precision,
        "world": environment.ranks().world,
        "steps_done": trainer.step,
        "stages": [],
    }
    streams = {}
    for number in range(index, len(run.stages)):
        first = number == index
        stream = (
            trainer.stream
            if first
            else make_stream(
                run, number, build(run.stages[number].objective, vocabulary=words), words
            )
        )
        steps = run.stages[number].budget.steps
        sources = stream.survey(steps) if hasattr(stream, "survey") else []
        found["stages"].append({"stage": number, "steps": steps, "sources": sources})
        streams[number] = stream
    figures.show(run, found)
    begun.show(trainer.stage.begun)
    for entry in found["stages"]:
        number = entry["stage"]
        chat.check_loss(f"stages.{number}", trainer, streams[number])
        if words is not None and entry["sources"]:
            figures.judge(number, run.stages[number], streams[number], entry["sources"], words)
        if number != index:
            streams[number].close()
    return found
