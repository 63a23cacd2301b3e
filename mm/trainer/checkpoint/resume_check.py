"""Loss of one kept batch, at a save and after a resume that cuts the tensors anew.

For another number of processes or ZeRO stage it must be what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from mm.batch import Batch, Values
from mm.errors import UserError
from mm.layout import Fields, Layout
from mm.run import EngineConfig
from mm.trainer import forward_only
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.ranks import on_main
from mm.trainer.stage import StageState

FILE = "probe"  # of the checkpoint, beside the networks' own
CLASSES: dict[str, Any] = {c.__name__: c for c in (Batch, Layout, Fields, Values)}
# Same batch, same weights: only the order of sums may change, with the threads or the kernels.
ROUNDING = {"fp32": 1e-4, "autocast_bf16": 2e-2, "bf16": 2e-2}


def keep(stage: StageState, step: int, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A micro-batch on the host as JSON and tensors, and its losses at ``step``.

    Call on all ranks.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(batch, "", tensors)
    found = losses(stage, step, batch)
    clean = {k: v if math.isfinite(v) else None for k, v in found.items()}
    return {"losses": clean, "precision": stage.env.precision, "batch": tree}, tensors


def losses(stage: StageState, step: int, batch: Batch) -> dict[str, float]:
    """Mean of every named loss over one micro-batch, in eval mode. Call on all ranks.

    Documents begin at its rows: no State is carried into them.
    """
    scheduled = stage.begin_step(step)
    with forward_only.in_eval_mode(stage, carried=None):
        sums, n = forward_only.losses(stage, [batch], scheduled)
    if stage.env.sequence is not None:
        sums, n = stage.env.sequence.total(sums), stage.env.sequence.total(n)
    return {k: float(s / n[k].clamp_min(1e-12)) for k, s in sums.items()}


def check(stage: StageState, snapshot: Snapshot, world: int, engine: EngineConfig) -> None:
    """Compare the losses of the kept batch with those of the save, when the tensors were cut anew.

    Call on all ranks.

    Raises:
        UserError: on all ranks; they differ by more than rounding.
    """
    kept = snapshot.state.get(FILE)
    before = snapshot.state["config"]["engine"]
    was = (snapshot.state["world"], before["zero_stage"], before.get("sequence", 1))
    now = (world, engine.zero_stage, engine.sequence)
    if kept is None or was == now:
        return
    batch = _restore(kept["batch"], snapshot.tensors(FILE))
    found = losses(stage, snapshot.state["step"], batch)
    rounding = max(ROUNDING[kept["precision"]], ROUNDING[stage.env.precision])

    def compare() -> None:
        for name, before in kept["losses"].items():
            after = found[name]
            if before is None or abs(after - before) <= rounding * max(abs(before), 1e-3):
                continue
            raise UserError(
                f"{snapshot.origin}: loss/{name} of the batch kept in it was {before:.6g} and is "
                f"{after:.6g} after the change from {was[0]} processes at ZeRO stage {was[1]} to "
                f"{now[0]} at stage {now[1]}: the weights are not those that were saved; go on as "
                f"before, or remove this folder to start from the checkpoint before it"
            )

    on_main(compare, stage.env.device)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a tree of dataclasses, named tuples and mappings; its tensors go to ``tensors``."""
    if isinstance(value, Tensor):
        key = f"{len(tensors):03d}{name}"
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    named = getattr(value, "_fields", None)  # of a named tuple
    if named is None and is_dataclass(value):
        named = [f.name for f in fields(value) if f.init]
    if named is not None:
        parts = {k: _flatten(getattr(value, k), f"{name}.{k}", tensors) for k in named}
        return {"class": type(value).__name__, "parts": parts}
    if isinstance(value, Mapping):
        items = [
            [list(k) if isinstance(k, tuple) else k, _flatten(v, f"{name}.{k}", tensors)]
            for k, v in value.items()
        ]
        return {"items": items}
    return {"value": list(value) if isinstance(value, tuple) else value}


def _restore(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "class" in tree:
        parts = {k: _restore(v, tensors) for k, v in tree["parts"].items()}
        return CLASSES[tree["class"]](**parts)
    if "items" in tree:
        pairs = [(tuple(k) if isinstance(k, list) else k, v) for k, v in tree["items"]]
        return {k: _restore(v, tensors) for k, v in pairs}
    value = tree["value"]
    return tuple(value) if isinstance(value, list) else value
