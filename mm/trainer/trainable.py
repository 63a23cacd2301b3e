"""Which parameters of a network train in a stage, and which rows of tables of ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mm.errors import UserError, did_you_mean
from mm.launch import environment
from mm.run import Stage
from mm.trainer.fit_weights import adapters, matches
from mm.trainer.optimizers.base import TRAINED_ROWS
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")

TABLES = ("embed", "heads.")  # beginnings of names of what may have a row an id


def set_trainable(
    module: nn.Module,
    stage: Stage,
    key: str,
    network: str = "model",
    vocabulary: Vocabulary | None = None,
    *,
    fresh: bool = False,
) -> None:
    """Turn gradients on for what trains, and off for all else.

    `Stage.train`, `freeze` and `train_rows` are of the model; further networks train whole. Of one
    with adapters only these train, unless ``train`` says otherwise. A matrix that two layers share
    trains where any of its names does, and stays where any of its names is frozen.

    Args:
        key: of the stage, for messages.
        vocabulary: whose ids have the rows.
        fresh: its weights were never trained, which is warned of where adapters train alone.
    Raises:
        UserError: a pattern fits no parameter, nothing is left to train, or no table has the rows.
    """
    train, freeze = (stage.train, stage.freeze) if network == "model" else (None, ())
    named = list(module.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    for field, globs in (("train", train or ()), ("freeze", freeze)):
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                near = did_you_mean(glob, _parts(names))
                raise UserError(f"{key}.{field}: no parameter is called '{glob}'{near}")
    if train is None:
        train = tuple(adapters(module)) or ("*",)
        if fresh and train != ("*",) and environment.ranks().is_main:
            say = "%s: adapters train on weights that nothing was learnt by: set init_from"
            log.warning(say, key)
    wanted = {p for name, p in named if matches(name, train)}
    wanted -= {p for name, p in named if matches(name, freeze)}
    if not wanted:
        raise UserError(f"{key}: train and freeze leave no parameter of '{network}' to train")
    for _, p in named:
        p.requires_grad_(p in wanted)
    if network == "model" and stage.train_rows:
        _mark_rows(module, stage.train_rows, f"{key}.train_rows", vocabulary)


def _mark_rows(
    module: nn.Module, modalities: Sequence[str], key: str, vocabulary: Vocabulary | None
) -> None:
    """Say of each table of ids that trains which of its rows do. Raises UserError naming ``key``.

    A table is what an embedder or head has with as many rows as there are ids.
    """
    size = vocabulary.size if vocabulary is not None else 0
    tables = [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and name.startswith(TABLES) and p.dim() and len(p) == size
    ]
    if vocabulary is None or not tables:
        raise UserError(
            f"{key}: no table with a row an id trains; where each modality has a table of its own "
            "name that in train"
        )
    found = []
    for modality in modalities:
        if modality not in vocabulary.modalities:
            near = did_you_mean(modality, vocabulary.modalities)
            raise UserError(f"{key}: the vocabulary has no modality '{modality}'{near}")
        ids = vocabulary.range(modality)
        found.append(slice(ids.begin, ids.stop))
    for p in tables:
        setattr(p, TRAINED_ROWS, tuple(found))


def hold_other_rows(module: nn.Module) -> None:
    """Let no gradient reach rows that do not train. Call once, when the network is filled.

    As their weights do not decay either, every optimizer and average leaves them bit by bit.
    """
    for p in module.parameters():
        if rows := getattr(p, TRAINED_ROWS, ()):
            p.register_hook(partial(_of_rows, rows))


def _of_rows(rows: Sequence[slice], grad: Tensor) -> Tensor:
    out = torch.zeros_like(grad)
    for each in rows:
        out[each] = grad[each]
    return out


def n_trained(module: nn.Module) -> int:
    """Elements of the parameters that train, of tables those of their rows that do."""
    return sum(_n_trained(p) for p in module.parameters() if p.requires_grad)


def _n_trained(p: nn.Parameter) -> int:
    rows = getattr(p, TRAINED_ROWS, None)
    return p.numel() if rows is None else sum(p[each].numel() for each in rows)


def _parts(names: Sequence[str]) -> set[str]:
    """Names, and globs of the modules that they stand in."""
    heads = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    return {*names, *(f"{head}.*" for head in heads)}
