"""Which parameters of a network train in a stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from mm.errors import UserError, did_you_mean
from mm.launch import environment
from mm.run import Stage
from mm.trainer.fit_weights import adapters, matches

log = logging.getLogger("mm.trainer")


def set_trainable(
    module: nn.Module, stage: Stage, key: str, network: str = "model", *, fresh: bool = False
) -> None:
    """Turn gradients on for what trains, and off for all else.

    `Stage.train` and `Stage.freeze` are of the model; further networks train whole. Of a network
    with adapters only these train, unless ``train`` says otherwise. A matrix that two layers share
    trains where any of its names does, and stays where any of its names is frozen.

    Args:
        key: of the stage, for messages.
        fresh: its weights were never trained, which is warned of where adapters train alone.
    Raises:
        UserError: a pattern fits no parameter, or nothing is left to train.
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


def n_trained(module: nn.Module) -> int:
    """Elements of the parameters that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _parts(names: Sequence[str]) -> set[str]:
    """Names, and globs of the modules that they stand in."""
    heads = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    return {*names, *(f"{head}.*" for head in heads)}
