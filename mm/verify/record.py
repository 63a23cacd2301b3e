"""What a run of `mm verify` writes down of its steps, and what the others hold against it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.batch import Batch
from mm.reading import parse_json
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.engine.gradients import Gradients, unclip
from mm.verify.tolerance import ROUNDOFF, SAFETY, UPDATE, rounding


class Done(Exception):
    """All steps are seen."""


class Record(Callback):
    """Of every step: losses, rows, whole gradients and weights, on rank 0.

    Args:
        root: the temporary folder of this command.
        role: of this run; its file is ``root/<role>.json``.
        steps: after which it ends.
    """

    def __init__(self, root: Path, role: str, steps: int):
        self.root, self.role, self.last = root, role, steps
        self.told: dict[str, Any] = {"steps": {}}
        self.gradients: dict[str, Tensor] = {}
        self._hooks: list[Gradients] = []

    def on_stage_start(self, trainer: Training) -> None:
        weights = self.weights(trainer)
        if trainer.is_main:
            self.begin(trainer, trainer.step, weights)

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        self._say(trainer, trainer.step + 1)
        self.gradients = {}
        for network, engine in trainer.stage.engines.items():
            names = [name for name, _ in engine.trainable()]
            self._hooks.append(Gradients(engine, names, self._take(network, trainer.is_main)))

    def _take(self, network: str, keep: bool) -> Any:
        def take(name: str, grad: Tensor) -> None:
            if keep:
                self.gradients[f"{network}.{name}"] = grad.detach().to("cpu", copy=True)

        return take

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        batches = trainer.batches if trainer.stage.env.leads else []  # several share rows
        mine = [row for batch in batches for row in rows_of(batch)]
        tokens = sum(int((b.layout.fields.document > 0).sum()) for b in batches)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (mine, tokens))
        weights = self.weights(trainer)
        if trainer.is_main:
            facts = {
                "losses": {k: v for k, v in metrics.items() if k.startswith("loss/")},
                "rows": [row for rows, _ in every for row in rows],
                "tokens": sum(n for _, n in every),
                "norms": {name: _norm(name, metrics) for name in trainer.stage.engines},
            }
            self.told["steps"][str(step)] = facts
            self.look(trainer, step, facts, weights)
        if step >= self.last:
            if trainer.is_main:
                self._write(trainer)
            raise Done

    def weights(self, trainer: Training) -> dict[str, Tensor]:
        """Whole fp32 weights and buffers of every engine. Call on all ranks."""
        return {
            f"{network}.{name}": t
            for network, engine in trainer.stage.engines.items()
            for name, t in engine.weights().items()
        }

    def begin(self, trainer: Training, step: int, weights: Mapping[str, Tensor]) -> None:
        """Before the first step, on rank 0."""

    def look(
        self, trainer: Training, step: int, facts: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        """After ``step`` (from 1), on rank 0; ``weights``: as they are after it."""

    def _file(self, kind: str, step: int) -> Path:
        return self.root / "tensors" / f"{kind}_{step}.safetensors"

    def _say(self, trainer: Training, step: int) -> None:
        if trainer.is_main:
            (self.root / "progress").write_text(f"step {step} of {self.last}")

    def _write(self, trainer: Training) -> None:
        precision, device = trainer.stage.env.precision, str(trainer.device)
        self.told |= {"precision": precision, "device": device}
        (self.root / f"{self.role}.json").write_text(json.dumps(self.told))


class Setting(Record):
    """The user's setting: everything is kept for the others."""

    def begin(self, trainer: Training, step: int, weights: Mapping[str, Tensor]) -> None:
        save_file(dict(weights), self._file("weights", step))

    def look(
        self, trainer: Training, step: int, facts: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        save_file(dict(weights), self._file("weights", step))
        save_file(self.gradients, self._file("gradients", step))


class Resumed(Record):
    """The same setting from its checkpoint on: counts what is not bit by bit as it was."""

    def begin(self, trainer: Training, step: int, weights: Mapping[str, Tensor]) -> None:
        self.told["from_step"] = step
        self.told["first"] = self._other("weights", step, weights)

    def look(
        self, trainer: Training, step: int, facts: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        other = self._other("gradients", step, self.gradients)
        facts["other"] = other or self._other("weights", step, weights)

    def _other(self, kind: str, step: int, found: Mapping[str, Tensor]) -> dict[str, Any] | None:
        was = load_file(self._file(kind, step))
        for name in sorted(was.keys() | found.keys()):
            if name not in was or name not in found:
                return {"what": kind, "step": step, "name": name, "difference": math.inf}
            if not torch.equal(was[name], found[name]):
                change = (was[name].double() - found[name].double()).norm()
                relative = float(change / was[name].double().norm().clamp_min(1e-30))
                return {"what": kind, "step": step, "name": name, "difference": relative}
        return None


class Reference(Record):
    """One process, fp32, reference kernels: at every step from the setting's own weights.

    Its update is made with the gradients of the setting, so that gradients and updates are judged
    each alone: rounding of the one does not grow into the other (Adam makes a whole step of the
    sign of a gradient that is zero but for rounding).

    Args:
        precision: of the setting, which says what is allowed.
    """

    def __init__(self, root: Path, role: str, steps: int, precision: str):
        super().__init__(root, role, steps)
        self.precision = precision
        self._before: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        step = trainer.step
        self._before = load_file(self._file("weights", step))
        file = self._file("gradients", step + 1)
        self._given = load_file(file)
        for network, engine in trainer.stage.engines.items():
            own = engine.raw.state_dict(keep_vars=True)
            with torch.no_grad():
                for name, tensor in own.items():
                    if f"{network}.{name}" in self._before:
                        tensor.copy_(self._before[f"{network}.{name}"])
        super().pre_step(trainer, batches)  # its hooks read before those below replace
        for network, engine in trainer.stage.engines.items():
            self._handles.append(engine.base.register_step_pre_hook(self._replace(network, engine)))

    def _replace(self, network: str, engine: Any) -> Any:
        names = {p: f"{network}.{name}" for name, p in engine.trainable()}

        @torch.no_grad()
        def replace(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    given = self._given.get(names.get(p, ""))
                    if given is not None and p.grad is not None:
                        p.grad.copy_(given)

        return replace

    def look(
        self, trainer: Training, step: int, facts: dict[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        setting = parse_json((self.root / "setting.json").read_text())["steps"][str(step)]
        after = load_file(self._file("weights", step))
        facts["gradients"], facts["updates"] = [], []
        for network, engine in trainer.stage.engines.items():
            matrices = sum(p.dim() > 1 for _, p in engine.trainable())
            allowed = rounding(self.precision, facts["tokens"], matrices)
            facts.setdefault("allowed", {})[network] = allowed
            clip = engine.grad_clip
            own = unclip(facts["norms"][network] or 0.0, clip)
            other = unclip(setting["norms"][network] or 0.0, clip)
            typical = _typical({k: own * g.double() for k, g in self.gradients.items()}, network)
            for name, p in engine.trainable():
                key = f"{network}.{name}"
                zero = torch.zeros(())
                g = own * self.gradients.get(key, zero).double()
                found = other * self._given.get(key, zero).double()
                size = max(float(g.norm()), typical * math.sqrt(p.numel()))
                facts["gradients"].append((key, _ratio(float((found - g).norm()), size), allowed))
                update = weights[key].double() - self._before[key].double()
                theirs = after[key].double() - self._before[key].double()
                # weights are stored in fp32, whose rounding is no fault of a small update
                grain = SAFETY * ROUNDOFF["fp32"] * float(self._before[key].double().norm())
                wrong = max(0.0, float((theirs - update).norm()) - grain)
                facts["updates"].append((key, _ratio(wrong, float(update.norm())), UPDATE))


def rows_of(batch: Batch) -> Iterator[str]:
    """A digest of every row, and of every item of values, of a micro-batch; padding left out."""
    fields = batch.layout.fields
    for b in range(batch.ids.shape[0]):
        document = fields.document[b]
        kept = document > 0
        own = document[kept]
        own = own - (own[:1] if len(own) else 0)  # their numbers go on over the rows of a batch
        parts = (batch.ids[b], batch.targets[b], batch.weight[b], fields.position[b])
        yield _digest(own, *(t[kept] for t in parts))
    for name, values in sorted(batch.values.items()):
        for g in range(values.data.shape[0]):
            if batch.ids.numel() and not int(values.room[g]):
                continue  # the zero item of a rank without this modality
            yield name + _digest(values.data[g, : int(values.length[g])])


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(str((t.dtype, tuple(t.shape))).encode())
        found.update(t.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _norm(network: str, metrics: Mapping[str, Any]) -> float | None:
    """Norm of a network's gradient; None where the step was left out."""
    prefix = "optim" if network == "model" else f"optim/{network}"
    value = float(metrics.get(f"{prefix}/grad_norm", 0.0))
    return value if math.isfinite(value) else None


def _typical(gradients: Mapping[str, Tensor], network: str) -> float:
    """Root mean square of all elements of a network's gradient.

    A gradient that is zero but for rounding (the bias of attention's keys) is judged by it.
    """
    mine = [g for key, g in gradients.items() if key.startswith(f"{network}.")]
    n = sum(g.numel() for g in mine)
    return math.sqrt(sum(float(g.square().sum()) for g in mine) / n) if n else 0.0


def _ratio(change: float, size: float) -> float:
    """Relative difference; inf where there is one of nothing, or none that is finite."""
    if not math.isfinite(change) or not math.isfinite(size):
        return math.inf
    return change / size if size else (math.inf if change else 0.0)
