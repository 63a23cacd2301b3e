"""Full tensors of a stage on the CPU, by file of the checkpoint."""

from __future__ import annotations

from torch import Tensor

from mm.trainer import stateful
from mm.trainer.stage import StageState


def collect(stage: StageState) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
    """Weights and optimizer states of every network, States that are carried. Call on all ranks.

    Returns:
        Tensors by file, and each engine's scalar optimizer states by network.
    """
    files: dict[str, dict[str, Tensor]] = {}
    scalars = {}
    for name, engine in stage.engines.items():
        files[name] = engine.weights()
        files[f"{name}.optimizer"], scalars[name] = engine.optimizer_state()
    for name, module in stage.frozen.items():
        if name in stage.from_folders:
            continue
        files[name] = {k: v.to("cpu", copy=True) for k, v in module.state_dict().items()}
    if stage.nets.carried is not None:
        files[stateful.FILE] = stage.nets.carried.full_tensors()
    return files, scalars
