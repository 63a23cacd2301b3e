"""Muon: orthogonalize momentum for the hidden matrices, AdamW for everything else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.registry import OPTIMIZERS
from mm.trainer.optimizers.base import Beta, Needs, OptimizerConfig, ShardOptimizer, adamw_update


def orthogonalize(m: Tensor, steps: int = 5) -> Tensor:
    """``U S' V^T`` of ``m = U S V^T`` `(A, B)`, singular values S' about 0.7 to 1.2.

    A quintic Newton-Schulz iteration, bfloat16 on a GPU, else float32.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", its
    coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.to(torch.bfloat16 if m.is_cuda else torch.float32)
    x = x.mT if m.shape[0] > m.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if m.shape[0] > m.shape[1] else x).to(m.dtype)


class Muon(ShardOptimizer):
    """``m = b m + (1 - b) g``; ``x -= lr (scale orth((1 - b) g + b m) + decay x)``.

    The momentum stays cut like every state of ZeRO; each step gathers the look-ahead momentum of a
    group, and each rank orthogonalises the matrices that it has a part of. At stages 1 and 2 these
    are its own share of them, at stage 3 all.

    Source: Jordan et al. 2024; scale 0.2 sqrt(max(A, B)), which gives AdamW's root mean square, and
    the decay: Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv:2502.16982), section 2.2.
    """

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if group["rule"] == "muon":
            return {"momentum": torch.zeros_like(x)}
        return {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        lr = group["lr"]
        x.mul_(1 - lr * group["weight_decay"])
        if group["rule"] != "muon":
            adamw_update(x, g, state, lr, group["betas"], group["eps"])
            return
        m = state["momentum"].lerp_(g, 1 - group["momentum"])
        flat = x.view(-1)
        for ahead, part in self.shards.gather(x, g.lerp(m, group["momentum"])):
            A, B = ahead.shape
            scale = 0.2 * max(A, B) ** 0.5 if group["match_adamw"] else max(1.0, A / B) ** 0.5
            full = orthogonalize(ahead, group["newton_schulz"])
            step = full.reshape(-1)[part.start : part.start + part.n]
            flat[part.at : part.at + part.n].add_(step, alpha=-lr * scale)


@OPTIMIZERS.register("muon")
class MuonConfig(OptimizerConfig):
    """Muon for two-dimensional weights whose name holds no word of ``adamw``; the rest by AdamW.

    A module may tag a parameter itself: ``param.use_muon = True`` or ``False``.
    """

    kind: Literal["muon"] = "muon"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 3e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    newton_schulz: Annotated[int, Field(gt=0, description="iterations")] = 5
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw: Annotated[
        tuple[str, ...], Field(description="words in the names of matrices left to AdamW")
    ] = ("embed", "heads", "conv")
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8

    @property
    def needs(self) -> Needs:
        return "gather"

    def rule(self, name: str, p: nn.Parameter) -> str:
        """Which half a parameter belongs to: "muon" or "adamw"."""
        tag = getattr(p, "use_muon", None)
        if tag is None:
            tag = p.dim() == 2 and not any(word in name.lower() for word in self.adamw)
        return "muon" if tag else "adamw"

    def build(self, module: nn.Module) -> Muon:
        """Make the optimizer over the trainable parameters of ``module``."""
        return Muon(
            self.groups(module, self.rule),
            lr=self.lr,
            momentum=self.momentum,
            newton_schulz=self.newton_schulz,
            match_adamw=self.scale == "match_rms_adamw",
            betas=self.betas,
            eps=self.eps,
        )
