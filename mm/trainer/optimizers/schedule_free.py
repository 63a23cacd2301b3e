"""Schedule-free AdamW: an average of the iterates takes the place of a falling learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import OptimizerConfig, ShardOptimizer


class ScheduleFreeAdamW(ShardOptimizer):
    """Gradients are taken at ``y = (1 - b) z + b x``; Adam's steps without momentum move ``z``.

    ``x``, the weights to evaluate, is the average of all ``z`` weighted by their squared rates.

    The network holds y; x is ``(y - (1 - b) z) / b`` and has no tensor of its own.

    Source: Defazio et al. 2024, "The Road Less Scheduled" (arXiv:2405.15682), algorithm 1.
    """

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"z": x.detach().clone(), "exp_avg_sq": torch.zeros_like(x), "weights": 0.0}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        z, v, t = state["z"], state["exp_avg_sq"], state["step"]
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        debias = (1 - b2**t) ** 0.5  # Adam's, on the rate
        u = g / v.sqrt().add_(group["eps"])
        u.add_(x, alpha=group["weight_decay"])
        # relative to the group's own peak, so that groups of other rates share the scalar
        weight = (group["lr"] / group.get("initial_lr", group["lr"]) * debias) ** 2
        state["weights"] += weight
        share = weight / state["weights"]
        lr = group["lr"] * debias
        x.lerp_(z, share).add_(u, alpha=lr * (b1 * (1 - share) - 1))
        z.add_(u, alpha=-lr)


@OPTIMIZERS.register("schedule_free_adamw")
class ScheduleFreeConfig(OptimizerConfig):
    """Schedule-free AdamW; its stage's schedule is warm-up, then constant."""

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-3
    betas: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(description="share of the average in y; decay of the squared gradients"),
    ] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8

    mup: ClassVar[bool] = True
    own_schedule: ClassVar[bool] = True

    def average(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return states["z"].lerp(weight, 1 / self.betas[0])

    def build(self, module: nn.Module) -> ScheduleFreeAdamW:
        """Make the optimizer over the trainable parameters of ``module``."""
        return ScheduleFreeAdamW(self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps)
