"""Adafactor: no momentum, updates clipped by parameter, the second moment in full or factored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import Needs, OptimizerConfig, ShardOptimizer


class Adafactor(ShardOptimizer):
    """Steps by factored second moments, clipped by their root mean square.

    ``v = b_t v + (1 - b_t)(g^2 + eps)``, ``u = g / sqrt(v)``, ``u /= max(1, rms(u) / clip)``,
    ``x -= lr (u + decay x)`` with ``b_t = 1 - t^-0.8``; ``relative`` multiplies lr by
    ``max(1e-3, rms(x))``. The root mean squares are over a parameter, summed over the ranks.

    Source: Shazeer & Stern 2018, "Adafactor" (arXiv:1804.04235), algorithms 2 (factored) and 4,
    with the unfactored moment where asked.
    """

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if group["factored"] and x.dim() > 1:
            row, column = x.new_zeros(x.shape[:-1]), x.new_zeros(*x.shape[:-2], x.shape[-1])
            return {"row": row, "column": column}
        return {"exp_avg_sq": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, keep = group["lr"], 1 - state["step"] ** -0.8
        square = g.square().add_(group["eps"])
        if "row" in state:
            row, column = state["row"], state["column"]
            row.lerp_(square.mean(-1), 1 - keep)
            column.lerp_(square.mean(-2), 1 - keep)
            v = (row / row.mean(-1, keepdim=True))[..., :, None] * column[..., None, :]
        else:
            v = state["exp_avg_sq"].lerp_(square, 1 - keep)
        u = g * v.rsqrt()
        of_u, of_x = self.shards.sums(x, u.square(), x.square())
        n = self.shards.sizes(x)
        factor = 1 / ((of_u / n).sqrt() / group["clip"]).clamp_min(1.0)
        if group["relative"]:
            factor = factor * (of_x / n).sqrt().clamp_min(1e-3)
        x.mul_(1 - lr * group["weight_decay"])
        flat, step = x.view(-1), u.view(-1)
        for i, _, part in self.shards.mine(x):
            here = slice(part.at, part.at + part.n)
            flat[here].addcmul_(step[here], factor[i], value=-lr)


@OPTIMIZERS.register("adafactor")
class AdafactorConfig(OptimizerConfig):
    """Adafactor. Factored moments need whole tensors: ZeRO stage 0 only."""

    kind: Literal["adafactor"] = "adafactor"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-3
    factored: Annotated[bool, Field(description="row and column means in place of v")] = False
    relative: Annotated[bool, Field(description="rate times the parameter's own size")] = False
    clip: Annotated[float, Field(gt=0, description="root mean square of an update")] = 1.0
    eps: Annotated[float, Field(gt=0, description="added to squared gradients")] = 1e-30

    @property
    def needs(self) -> Needs:
        return "tensors" if self.factored else "elements"

    def build(self, module: nn.Module) -> Adafactor:
        """Make the optimizer over the trainable parameters of ``module``."""
        return Adafactor(
            self.groups(module),
            lr=self.lr,
            factored=self.factored,
            relative=self.relative,
            clip=self.clip,
            eps=self.eps,
        )
