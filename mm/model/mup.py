"""muP, the maximal update parametrisation.

Rates and scales that let one learning rate serve all widths.

Source: Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer" (arXiv:2203.03466), table 3 (Adam), written relative to a base width at
which nothing changes.
"""

from __future__ import annotations

import torch
from torch import nn

from mm.model.layer import Linear


def rates(model: nn.Module, base: int, d_model: int) -> dict[str, float]:
    """Multiple of the learning rate that each parameter takes, by name.

    Matrices of the backbone and the heads read something as wide as the model: base / width. The
    embedding table is multiplied by sqrt(width) in its forward: sqrt(base / width). Gains, biases,
    convolutions and adapters: 1.
    """
    ratio = base / d_model
    out = {name: 1.0 for name, _ in model.named_parameters()}
    for where in ("backbone", "heads"):
        for path, module in getattr(model, where).named_modules(prefix=where):
            if isinstance(module, Linear):
                own = {name for name, _ in module.named_parameters(recurse=False)}
                out |= {f"{path}.{n}": ratio for n in own.intersection(module.wide_parameters)}
    for name in model.heads:  # type: ignore[union-attr]
        out[f"heads.{name}.weight"] = ratio
    out["embedder.weight"] = ratio**0.5
    return out


def rescale(model: nn.Module, base: int, d_model: int) -> None:
    """Shrink the initial read-outs from width ** -0.5 to width ** -1 growth."""
    with torch.no_grad():
        for name in model.heads:  # type: ignore[union-attr]
            model.get_parameter(f"heads.{name}.weight").mul_((base / d_model) ** 0.5)
