"""muP, the maximal update parametrisation.

Rates and scales that let one learning rate serve all widths.

Source: Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer" (arXiv:2203.03466), table 3 (Adam), written relative to a base width at
which nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mm.model.layer import Linear


def rates(model: Any, base: int, d_model: int) -> dict[str, float]:
    """Multiple of the learning rate that each parameter takes, by name.

    Matrices of the backbone read something as wide as the model: base / width; so do those of heads
    and adapters that grow with the model where they read. What an embedder has of the model's width
    is multiplied by sqrt(width) in its forward: sqrt(base / width). Gains, biases, tables and what
    reads a width of its own: 1.
    """
    ratio = base / d_model
    out = {name: 1.0 for name, _ in model.named_parameters()}
    for path, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, Linear):
            own = {name for name, _ in module.named_parameters(recurse=False)}
            out |= {f"{path}.{n}": ratio for n in own.intersection(module.wide_parameters)}
    out |= {name: ratio for name in _reading_the_width(model) if name in out}
    out |= {f"embedder.{name}": ratio**0.5 for name in model.embedder.wide_parameters}
    return out


def rescale(model: Any, base: int, d_model: int) -> None:
    """Shrink the initial read-outs from width ** -0.5 to width ** -1 growth."""
    wide = _reading_the_width(model)
    with torch.no_grad():
        for name, head in model.heads.items():
            if f"heads.{name}.weight" in wide and not head.scale_free:
                head.weight.mul_((base / d_model) ** 0.5)


def _reading_the_width(model: Any) -> set[str]:
    """Matrices of heads and adapters that sum over something as wide as the model.

    Found by what changes where each is built for another width: a layer may have a width of its
    own, which may be the same number. Dimension 1 is what a matrix reads, but of tables that are
    looked up.
    """
    config, n_ids = model.config, model.embedder.n_ids
    own = {f"heads.{n}": lambda d, c=c: c.build(d, n_ids) for n, c in config.heads.items()}
    own |= {f"adapters.{n}": lambda d, c=c: c.build(d) for n, c in config.adapters.items()}
    return {f"{path}.{p}" for path, build in own.items() for p in _growing(build, config.d_model)}


def _growing(build: Callable[[int], nn.Module], d_model: int) -> set[str]:
    with torch.device("meta"):
        module, other = build(d_model), build(2 * d_model)
    tables = {
        f"{path}.{name}".lstrip(".")
        for path, each in module.named_modules()
        for name in getattr(each, "looked_up", ())
    }
    wider = dict(other.named_parameters())
    return {
        name
        for name, p in module.named_parameters()
        if p.dim() > 1 and p.shape[1] != wider[name].shape[1] and name not in tables
    }
