"""Image tokenizers for tests: made, fed, and trained by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm.batch import Batch, Sum, Values
from mm.model.layer import ModelOut, init_weights
from mm.objectives.vq import VqObjective


def build(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = config.build()
    init_weights(net)
    return net


def batch(image: Tensor, length: Tensor | None = None) -> Batch:
    return Batch.of_values({"image": Values.items(image, length)})


class HandEnv:
    """What the trainer lends, for a loop written by hand."""

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks, self.step = networks, 0
        self.device, self.rng = torch.device("cpu"), torch.Generator()

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        self.networks[name].requires_grad_(False)
        yield self.networks[name]
        self.networks[name].requires_grad_(True)

    def gather(self, x: Tensor) -> Tensor:
        return x


def run_step(
    objective: VqObjective,
    micros: list[Batch],
    env: HandEnv,
    optimizers: dict[str, torch.optim.Optimizer] | None = None,
) -> dict[str, float]:
    """One step of the loop: sums over global counts, backward a LossTerm, step where it says.

    Returns global means.
    """
    scheduled = objective.scheduled(env.step, np.random.default_rng(0))
    counts: dict[str, Tensor] = {}
    for b in micros:
        for name, n in objective.counts(b).items():
            counts[name] = counts.get(name, torch.zeros(())) + n
    scales = objective.scales(counts)
    stats: dict[str, dict[str, Sum]] = {name: {} for name in env.networks}

    def caller(name: str) -> Callable[..., ModelOut]:
        def call(b: Batch, **kw: Any) -> ModelOut:
            out = env.networks[name](b, scheduled=scheduled, **kw)
            if torch.is_grad_enabled():
                for key, each in out.aux.items():
                    old = stats[name].get(key)
                    stats[name][key] = each.detach() if old is None else old + each.detach()
            return out

        return call

    means: dict[str, float] = {}
    for term in objective.terms(micros, {name: caller(name) for name in env.networks}, env):
        each = {k: scales[k] * v / counts[k] for k, v in term.losses.items()}
        torch.stack(list(each.values())).sum().backward()
        for k, v in term.losses.items():
            means[k] = means.get(k, 0.0) + float(v.detach() / counts[k])
        if term.step and optimizers:
            nn.utils.clip_grad_norm_(env.networks[term.network].parameters(), 1.0)
            optimizers[term.network].step()
            optimizers[term.network].zero_grad()
            if hasattr(env.networks[term.network], "after_step"):
                env.networks[term.network].after_step(stats[term.network])
    env.step += 1
    return means


def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out scans, ``(N, 1, 32, 32)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[360:]], x[order[:360]]
