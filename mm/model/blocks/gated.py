"""Gates on both branches that begin closed: a layer put between trained ones changes nothing yet.

B rows, T tokens, D model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.model.blocks.prenorm import PreNorm, PreNormConfig
from mm.model.context import Ctx
from mm.model.layer import FeedForward, Mixer
from mm.registry import BLOCKS


class Gated(PreNorm):
    """``x + tanh(a) mixer(norm(x))``, then ``x + tanh(b) ffn(norm(x))``; a and b begin at 0.

    Source: Alayrac et al. 2022, Flamingo (arXiv:2204.14198), section 2.2, around cross-attention;
    so used in NVLM-X: Dai et al. 2024 (arXiv:2409.11402).
    """

    def __init__(self, d_model: int, mixer: Mixer, ffn: FeedForward | None, config: GatedConfig):
        super().__init__(d_model, mixer, ffn, config)
        names = ("mixer",) if ffn is None else ("mixer", "ffn")
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.empty(1)) for name in names})

    def init_weights(self) -> None:
        for gate in self.gates.values():
            nn.init.zeros_(gate)

    def scale_branch(self, y: Tensor, ctx: Ctx, name: str) -> Tensor:
        return super().scale_branch(y, ctx, name) * self.gates[name].tanh().to(y.dtype)


@BLOCKS.register("gated")
class GatedConfig(PreNormConfig):
    """The residual block with a gate on each branch that begins closed; for layers put in later."""

    kind: Literal["gated"] = "gated"  # type: ignore[assignment]

    def build(self, d_model: int, mixer: Mixer, ffn: FeedForward | None = None) -> Gated:
        return Gated(d_model, mixer, ffn, self)
