"""Losses of given batches by networks that train: nothing learns and nothing is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mm.batch import Batch
from mm.trainer.stage import StageState
from mm.trainer.stateful import CarriedStates


@contextlib.contextmanager
def in_eval_mode(stage: StageState, carried: CarriedStates | None) -> Iterator[None]:
    """Every module of the stage in eval mode, uncompiled, with other carried States.

    Afterwards each is as it was. Call on all ranks.
    """
    was = [m for e in stage.engines.values() for m in e.raw.modules() if m.training]
    before, stage.nets.carried = stage.nets.carried, carried
    for engine in stage.engines.values():
        engine.raw.eval()
    eager = torch.compiler.set_stance("force_eager") if stage.compiled else contextlib.nullcontext()
    try:
        with eager, torch.no_grad():
            yield
    finally:
        stage.nets.carried = before
        for module in was:
            module.training = True


def losses(
    stage: StageState, batches: Sequence[Batch], scheduled: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of every named loss over the micro-batches of one step, and their counts, () each.

    Of this rank; inside `in_eval_mode`, with the stage's generators seeded. Call on all ranks.

    Args:
        batches: on the host.
        scheduled: values of the objective.
    """
    objective, env, carried = stage.objective, stage.env, stage.nets.carried
    micros = [objective.corrupt(env.take(b), env.rng, scheduled) for b in batches]
    env.know(micros)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for micro in micros:
        for name, n in objective.counts(micro).items():
            counts[name] = counts[name] + n.double() if name in counts else n.double()
    for term in objective.terms(micros, stage.nets, env):
        for name, value in term.losses.items():
            value = value.detach().double()
            sums[name] = sums[name] + value if name in sums else value
    if carried is not None:
        carried.commit(applied=True)
    return sums, counts
