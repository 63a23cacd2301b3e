"""What this process holds of a stage, by file of the checkpoint."""

from __future__ import annotations

from mm.trainer import stateful
from mm.trainer.checkpoint.held import Held, masters, states, still
from mm.trainer.stage import StageState


def collect(stage: StageState) -> tuple[dict[str, dict[str, Held]], dict[str, dict[str, float]]]:
    """Weights and optimizer states of every network, States that are carried: views, no copies.

    Returns:
        Tensors by file, and each engine's scalar optimizer states by network.
    """
    files: dict[str, dict[str, Held]] = {}
    scalars = {}
    for name, engine in stage.engines.items():
        files[name] = masters(engine)
        files[f"{name}.optimizer"], scalars[name] = states(engine)
    for name, module in stage.frozen.items():
        if name in stage.from_folders:
            continue
        files[name] = still(module)
    if stage.nets.carried is not None:
        files[stateful.FILE] = stage.nets.carried.own_rows()
    return files, scalars
