"""Layers: what goes on inside a network, layer by layer, every N steps. Off unless a run names it.

It reads what passes by (hooks of modules, gradients of their outputs, `Op.observer`), only in the
steps that are due, and changes no bit of the training. General over the registries: a mixer, a
feed-forward layer or an op of yours is seen like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch
from mm.config import Config
from mm.errors import UserError
from mm.kernels.op import Op
from mm.model.layer import Block, FeedForward, Mixer, Out
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.log.metrics import all_reduce


@CALLBACKS.register("layers")
class LayersConfig(Config):
    """``callbacks: [{kind: layers, every: 100}]``."""

    kind: Literal["layers"] = "layers"
    every: Annotated[int, Field(gt=0, description="steps between looks")] = 100
    entropy: Annotated[
        bool, Field(description="of attention; runs it a second time in the steps that are due")
    ] = True

    def build(self) -> Layers:
        return Layers(self)


class Layers(Callback):
    """Adds ``layers/<path of the module>/<figure>`` to the metrics of every `every`-th step.

    Of blocks, mixers and feed-forward layers: ``activation_rms`` of their output,
    ``gradient_rms`` of the loss with respect to it. Of attention: ``attention_entropy`` in nats,
    the mean over queries, heads and rows. Of recurrences: ``state_rms``, root mean square of the
    state after the call, and ``decay``, the mean share of it that a token keeps. Of routed
    feed-forward layers that report ``load``: ``load_max`` and ``load_min``, in shares of an even
    load.
    """

    adds_metrics = True

    def __init__(self, config: LayersConfig):
        self.config = config
        self._sums: dict[str, list[Tensor]] = {}  # figure -> [total, count]
        self._loads: dict[str, Tensor] = {}
        self._inside: list[str] = []  # paths of the layers that run now
        self._hooks: list[Any] = []
        self._asking = self._due = False

    def check(self, trainer: Training) -> None:
        if trainer.run.engine.compile:
            raise UserError(
                "callbacks.layers: compiled blocks cannot be looked into; set engine.compile=false "
                "or leave this callback out"
            )

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        self._leave()
        if (trainer.step + 1) % self.config.every:
            return
        self._sums, self._loads, self._inside, self._due = {}, {}, [], True
        for engine in trainer.stage.engines.values():
            for path, module in engine.raw.named_modules():
                if isinstance(module, (Block, Mixer, FeedForward)):
                    self._watch(path, module)
        Op.observer = self._observe

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        if name != "step":  # a held-out loss is none of its business
            self._leave()

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if not self._due:
            return
        self._due = False
        names, loads = sorted(self._sums), sorted(self._loads)
        parts = [part for name in names for part in self._sums[name]]
        parts = all_reduce([*parts, *(self._loads[name] for name in loads)])
        values = torch.stack([p for p in parts[: 2 * len(names)]]).tolist() if names else []
        for i, name in enumerate(names):
            total, count = values[2 * i : 2 * i + 2]
            mean = total / max(count, 1e-12)
            metrics[f"layers/{name}"] = mean**0.5 if name.endswith("_rms") else mean
        for name, load in zip(loads, parts[2 * len(names) :], strict=True):
            even = load / load.mean().clamp_min(1e-12)
            metrics[f"layers/{name}_max"] = float(even.max())
            metrics[f"layers/{name}_min"] = float(even.min())

    def on_end(self, trainer: Training) -> None:
        self._leave()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        # A bound method is a new object each time it is asked for: equal, not the same.
        if Op.observer == self._observe:
            Op.observer = None

    def _watch(self, path: str, module: nn.Module) -> None:
        def begin(module: nn.Module, given: Any) -> None:
            self._inside.append(path)

        def end(module: nn.Module, given: Any, out: Any) -> None:
            self._inside.pop()
            if isinstance(out, Out):
                self._output(path, out)

        self._hooks.append(module.register_forward_pre_hook(begin))
        # Also when the forward raised, or the stack of paths would be wrong from then on.
        self._hooks.append(module.register_forward_hook(end, always_call=True))

    @torch.no_grad()
    def _output(self, path: str, out: Out) -> None:
        self._mean_square(f"{path}/activation_rms", out.y)
        if out.y.requires_grad:
            out.y.register_hook(lambda grad: self._mean_square(f"{path}/gradient_rms", grad))
        for name, each in out.aux.items():
            if name.rpartition(".")[2] == "load" and each.total.dim() == 1:
                load = each.total.detach().float()
                key = f"{path}/load"
                self._loads[key] = self._loads[key] + load if key in self._loads else load

    def _mean_square(self, name: str, x: Tensor) -> None:
        x = x.detach().float()
        # A reduction over a view of it: no copy of the squares.
        self._add(name, torch.linalg.vector_norm(x).square(), float(x.numel()))

    def _add(self, name: str, total: Tensor, count: float) -> None:
        total = total.detach().float().reshape(())
        number = torch.full_like(total, count)
        have = self._sums.get(name)
        self._sums[name] = [have[0] + total, have[1] + number] if have else [total, number]

    @torch.no_grad()
    def _observe(self, op: Op, args: tuple[Any, ...], kw: dict[str, Any], result: Any) -> None:
        """Look at a call of an op inside a mixer."""
        if self._asking or not self._inside:
            return
        path = self._inside[-1]
        bound = inspect.signature(op).bind(*args, **kw)
        bound.apply_defaults()
        given = bound.arguments
        if op.name == "attention":
            if self.config.entropy and not given["return_stats"]:
                self._entropy(path, op, given)
            return
        read = DECAYS.get(op.name)
        if read is None:
            return
        decay = read(given)
        if decay is not None:
            self._add(f"{path}/decay", decay.float().mean(), 1.0)
        if isinstance(result, tuple) and len(result) > 1 and torch.is_tensor(result[1]):
            self._mean_square(f"{path}/state_rms", result[1])

    def _entropy(self, path: str, op: Op, given: Mapping[str, Any]) -> None:
        self._asking = True
        try:
            _, entropy = op(*(dict(given) | {"return_stats": ("entropy",)}).values())
        finally:
            self._asking = False
        self._add(f"{path}/attention_entropy", entropy.sum(), float(entropy.numel()))


def _exponential(name: str) -> Callable[[Mapping[str, Any]], Tensor | None]:
    return lambda given: given[name].float().exp() if given.get(name) is not None else None


def _modulus(a: Tensor, dim: int) -> Tensor:
    real, imaginary = a.float().chunk(2, dim)
    return torch.hypot(real, imaginary)


def _of_linear_scan(given: Mapping[str, Any]) -> Tensor:
    return given["a_BTD"].float().exp() if given.get("log") else given["a_BTD"]


def _of_selective_scan(given: Mapping[str, Any]) -> Tensor:
    """At each channel's mean step: the decays of all tokens would be N times the activations."""
    step_D = given["dt_RTD"].float().mean((0, 1))
    return (given["a_ND"].float() * step_D).exp()


# Share of the state that a token keeps, from the arguments of an op.
DECAYS: dict[str, Callable[[Mapping[str, Any]], Tensor | None]] = {
    "linear_attention": _exponential("log_decay"),
    "delta_rule": _exponential("g_BTH"),
    "linear_scan": _of_linear_scan,
    "complex_scan": lambda given: _modulus(given["a"], -1),
    "diagonal_ssm": lambda given: _modulus(given["a_PDN"], 0),
    "dense_ssm": lambda given: None,
    "selective_scan": _of_selective_scan,
}
