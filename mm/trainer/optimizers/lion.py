"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import Beta, OptimizerConfig, ShardOptimizer


class Lion(ShardOptimizer):
    """``x -= lr (sign(b1 m + (1 - b1) g) + decay x)``, then ``m = b2 m + (1 - b2) g``.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675),
    algorithm 2.
    """

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"exp_avg": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m, (b1, b2) = state["exp_avg"], group["betas"]
        x.mul_(1 - group["lr"] * group["weight_decay"])
        x.add_(m.lerp(g, 1 - b1).sign_(), alpha=-group["lr"])
        m.lerp_(g, 1 - b2)


@OPTIMIZERS.register("lion")
class LionConfig(OptimizerConfig):
    """Lion; its rate is 3 to 10 times smaller than AdamW's, its decay as much larger."""

    kind: Literal["lion"] = "lion"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-4
    weight_decay: Annotated[float, Field(ge=0, description="decoupled, times the rate")] = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.99)

    mup: ClassVar[bool] = True

    def build(self, module: nn.Module) -> Lion:
        """Make the optimizer over the trainable parameters of ``module``."""
        return Lion(self.groups(module), lr=self.lr, betas=self.betas)
