"""Machine: tokens a second and device, MFU, memory, the parts of a step, every rank's time."""

from __future__ import annotations

import resource
import time
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import Embedder, Head
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.data_sheets import like

MIB = 2**20


@CALLBACKS.register("machine")
class MachineConfig(Config):
    """Always on; name it in a run only to change it."""

    kind: Literal["machine"] = "machine"
    every: Annotated[
        int, Field(gt=0, description="steps between figures of memory and of every rank")
    ] = 10

    def build(self) -> Machine:
        return Machine(self)


class Machine(Callback):
    """Adds ``time/<part>`` and ``perf/...`` to every step, and memory and ranks to some.

    ``perf/mfu`` counts 6 FLOPs a token and weight that is multiplied, as the peers do: neither
    attention over tokens nor what is recomputed. ``ranks/slowest`` is the number of the rank with
    the longest time outside the collectives, ``ranks/slowest_seconds`` and ``ranks/median_seconds``
    that time and the median rank's; ``ranks/<n>`` are all of them, where they are at most 64.
    """

    adds_metrics = True

    def __init__(self, config: MachineConfig):
        self.config = config
        self._weights = 0
        self._peak = 0.0
        self._begun = 0.0

    def on_stage_start(self, trainer: Training) -> None:
        self._weights = multiplied_weights(trainer.stage.engines["model"].raw)
        self._peak = peak_flops(trainer.device, trainer.stage.env.precision)

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        self._begun = time.perf_counter()

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        lasted = time.perf_counter() - self._begun
        parts = trainer.stage.clock.seconds()
        metrics |= {f"time/{part}": seconds for part, seconds in parts.items()}
        metrics["time/data"] = waited = metrics["data/wait_seconds"]
        world = dist.get_world_size()
        if "perf/tokens_per_second" in metrics:
            rate = metrics["perf/tokens_per_second"] / world
            metrics["perf/tokens_per_second_device"] = rate
            if self._peak:
                metrics["perf/mfu"] = 6 * self._weights * rate / self._peak
        if step % self.config.every and step != 1:
            return
        metrics |= memory(trainer.device)
        if world > 1:
            own = lasted + waited - parts.get("communication", 0.0)
            metrics |= of_ranks(own, trainer.device)


def of_ranks(own: float, device: torch.device) -> dict[str, float]:
    """Figures of every rank's ``own`` seconds. Call on all ranks."""
    mine = torch.tensor([own], device=device, dtype=torch.float32)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(each, mine)
    seconds = torch.cat(each).tolist()
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    out = {
        "ranks/slowest": slowest,
        "ranks/slowest_seconds": seconds[slowest],
        "ranks/median_seconds": sorted(seconds)[len(seconds) // 2],
    }
    if len(seconds) <= 64:
        out |= {f"ranks/{rank}": value for rank, value in enumerate(seconds)}
    return out


def memory(device: torch.device) -> dict[str, float]:
    """Peaks of this process in MiB since its start."""
    out = {"memory/host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        out["memory/peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB
        out["memory/reserved_mib"] = torch.cuda.max_memory_reserved(device) / MIB
    return out


def multiplied_weights(module: torch.nn.Module) -> int:
    """Weights that a token is multiplied with: all but tables that are only looked up."""
    embedders = [m for m in module.modules() if isinstance(m, Embedder)]
    tables = {id(m.get_parameter(name)) for m in embedders for name in m.looked_up}
    tables -= {id(m.weight) for m in module.modules() if isinstance(m, Head)}
    return sum(
        int(getattr(p, "ds_numel", p.numel())) for p in module.parameters() if id(p) not in tables
    )


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that the device can do in this precision; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    card = like(torch.cuda.get_device_name(device))
    if card is None:
        return 0.0
    return card.fp32 if precision == "fp32" else card.bf16  # torch leaves TF32 off
