"""An optimizer step of a stage on fake CUDA tensors: the trainer's own, without DeepSpeed."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.batch import Batch
from mm.plan.fake_cuda import CUDA, Reads, backward
from mm.plan.inputs import CPU
from mm.run import Run
from mm.trainer.ema import Averages
from mm.trainer.engine.deepspeed import Engine
from mm.trainer.engine.zero_shards import Shards
from mm.trainer.env import Nets, TrainerEnv
from mm.trainer.log.clock import StepClock
from mm.trainer.log.metrics import CodebookUsage
from mm.trainer.stage import StageState, all_networks, build, make_module
from mm.trainer.step import optimizer_step
from mm.trainer.trainable import hold_other_rows, set_trainable
from mm.vocabulary import Vocabulary


class FakeEngine(Engine):
    """An engine at ZeRO stage 0 whose backward calls formulas itself."""

    def __init__(self, module: nn.Module, optimizer: Any, run: Run, ema: Any):
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.raw, self.optimizer, self.ema = module, optimizer, ema
        self.zero_stage, self.grad_clip, self.updates = 0, run.engine.grad_clip, 0
        self.ds = _Plain(optimizer)
        names: dict[Tensor, str] = {p: name for name, p in self.trainable()}
        self.shards = Shards.from_groups(optimizer.param_groups, names)
        self._averages: dict[Tensor, Tensor] = {}
        self._restart_averages()

    def __call__(self, *args: Any, **kw: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return self.raw(*args, **kw)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        backward(loss)

    def reduce(self) -> Tensor | None:
        grads = [p.grad for p in self.raw.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).float()


class _Plain:
    """What `Engine` asks of DeepSpeed at ZeRO stage 0 with one process."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.basic_optimizer = optimizer

    def step(self) -> None:
        self.basic_optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.basic_optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return True


def build_stage(run: Run, index: int, vocabulary: Vocabulary | None) -> StageState:
    """A stage with its networks on `CUDA`; call in `fake_cuda`."""
    config = run.stages[index]
    objective = build(config.objective, vocabulary=vocabulary)
    env = TrainerEnv(run.seed, CUDA, "autocast_bf16")
    wanted = all_networks(run, objective)
    engines: dict[str, Engine] = {}
    frozen: dict[str, nn.Module] = {}
    for name, network in wanted.items():
        module = make_module(network.config, vocabulary, run.seed, CUDA)
        if network.mode == "train":
            set_trainable(module, config, f"stages.{index}", name, vocabulary)
            hold_other_rows(module)
            optimizer = config.optimizer.build(module)
            engines[name] = FakeEngine(module.train(), optimizer, run, config.ema)
        else:
            frozen[name] = module.eval().requires_grad_(False)
    env.lend(engines, frozen)
    nets = Nets(engines, frozen, env)
    averages = Averages(wanted, engines, frozen, None)
    return StageState(
        index, 0, config, objective, engines, frozen, averages, env, nets, None, False, 0,
        {name: sum(p.numel() for p in e.raw.parameters()) for name, e in engines.items()},
        StepClock(CPU),
    )  # fmt: skip


def train_step(
    reads: Reads, stage: StageState, step: int, micros: Sequence[Batch], vocabulary: Any
) -> list[str]:
    """One step of the trainer; returns what it read of the device."""
    reads.places.clear()
    modalities = vocabulary.modalities if vocabulary is not None else None
    with unittest.mock.patch.object(dist, "get_world_size", lambda *_: 1):
        optimizer_step(stage, step, micros, CodebookUsage(), modalities, False)
    return list(reads.places)
