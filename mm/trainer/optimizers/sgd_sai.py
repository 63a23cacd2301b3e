"""SGD-SaI: momentum with one learning rate a parameter, measured on the first gradients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import OptimizerConfig, ShardOptimizer


class SgdSai(ShardOptimizer):
    """``m = b m + (1 - b) g``, ``x -= lr (rate m + decay x)``, one state tensor a parameter.

    rate = ``|g| / (std(g) + eps)`` of the parameter's first gradient, kept for good.

    A gradient without spread (one element, all zero) takes the square root of its size, the ratio
    of a gradient of mean 0.

    Source: Xu et al. 2024, "No More Adam: Learning Rate Scaling at Initialization is All You Need"
    (arXiv:2412.11768); without a normalisation over parameters, as in the authors' release.
    """

    per_parameter = ("rate",)

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(x), "rate": x.new_zeros(len(self.shards.spans[x]))}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr, m = group["lr"], state["momentum"]
        if state["step"] == 1:
            state["rate"].copy_(self._rates(x, g, group["eps"]))
            m.copy_(g)
        else:
            m.lerp_(g, 1 - group["momentum"])
        x.mul_(1 - lr * group["weight_decay"])
        flat, ahead = x.view(-1), m.view(-1)
        for i, _, part in self.shards.mine(x):
            here = slice(part.at, part.at + part.n)
            flat[here].addcmul_(ahead[here], state["rate"][i], value=-lr)

    def _rates(self, x: Tensor, g: Tensor, eps: float) -> Tensor:
        """Signal-to-noise ratio of every parameter's gradient, `(spans,)`."""
        total, squares = self.shards.sums(x, g, g.double().square()).double()
        n = self.shards.sizes(x).double()
        variance = ((squares - total.square() / n) / (n - 1).clamp_min(1)).clamp_min(0)
        ratio = squares.sqrt() / (variance.sqrt() + eps)
        return torch.where(variance > 1e-12 * squares, ratio, n.sqrt()).float()


@OPTIMIZERS.register("sgd_sai")
class SgdSaiConfig(OptimizerConfig):
    """SGD-SaI: half of AdamW's states."""

    kind: Literal["sgd_sai"] = "sgd_sai"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, module: nn.Module) -> SgdSai:
        """Make the optimizer over the trainable parameters of ``module``."""
        return SgdSai(self.groups(module), lr=self.lr, momentum=self.momentum, eps=self.eps)
