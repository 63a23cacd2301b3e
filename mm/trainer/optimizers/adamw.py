"""AdamW with decay on matrices only."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from mm.config import Config
from mm.registry import OPTIMIZERS


@OPTIMIZERS.register("adamw")
class AdamWConfig(Config):
    """Decoupled weight decay; elementwise, so it is legal on ZeRO's flat shards.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[
        float, Field(ge=0, description="on matrices only: no norm, bias, embedding")
    ] = 0.1

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer over the trainable parameters of ``module`` in two groups."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, p in module.named_parameters():
            if p.requires_grad:
                (decayed if p.dim() > 1 and "embed" not in name.lower() else plain).append(p)
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, self.weight_decay), (plain, 0.0))
            if group
        ]
        # fused: one pass over memory; the same rounding on single tensors and on flat shards
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
