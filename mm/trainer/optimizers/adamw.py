"""AdamW with decay on matrices only."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import Beta, OptimizerConfig


@OPTIMIZERS.register("adamw")
class AdamWConfig(OptimizerConfig):
    """Decoupled weight decay; elementwise, so it is legal on ZeRO's flat shards.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-3
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8

    mup: ClassVar[bool] = True

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer over the trainable parameters of ``module``."""
        # fused: one pass over memory; the same rounding on single tensors and on flat shards
        return torch.optim.AdamW(
            self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, fused=True
        )
