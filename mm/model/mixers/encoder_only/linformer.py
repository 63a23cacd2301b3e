"""Attention to a fixed number of mixtures of positions.

R rows of one document, L tokens, D model, H heads, K head width, m mixtures.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.encoder_only.base import BothWays
from mm.registry import MIXERS


class Linformer(BothWays):
    """``softmax(Q (E K)^T / sqrt(d)) (F V)`` with learned ``E, F`` from positions to m mixtures.

    ``share``: one E and one F for all heads (``heads``), or one for keys, values and all heads
    (``key_value``). Documents shorter than ``max_len`` use the first columns.

    Source: Wang et al. 2020 (arXiv:2006.04768), eq. 7; sharing: section 4.
    """

    def __init__(self, d_model: int, config: LinformerConfig, linear: LinearFactory):
        super().__init__()
        self.heads = config.heads
        self.limit_length(config.max_len)
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.out = linear(d_model, d_model, "out")
        count = {"none": 2 * config.heads, "heads": 2, "key_value": 1}[config.share]
        self.mixtures = nn.Parameter(torch.empty(count, config.mixtures, config.max_len))

    def init_weights(self) -> None:
        nn.init.normal_(self.mixtures, std=self.mixtures.shape[1] ** -0.5)

    def mix(self, x_RLD: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        (R, L, D), H, there = x_RLD.shape, self.heads, self.of_rows(ctx)
        q, k, v = self.qkv(x_RLD, there).view(R, L, 3, H, D // H).unbind(2)
        wide = torch.promote_types(v.dtype, torch.float32)
        valid = (torch.arange(L, device=length_R.device) < length_R[:, None])[..., None, None]
        maps = self.mixtures[..., :L].to(wide)
        e, f = maps.chunk(2) if len(maps) > 1 else (maps, maps)
        with torch.autocast(v.device.type, enabled=False):
            # (H or 1, m, L) maps; what is not there adds nothing, whatever the plug's bias.
            k, v = (
                torch.einsum(
                    "hml,rlhk->rmhk", t.expand(H, -1, -1), u.to(wide).masked_fill(~valid, 0)
                )
                for t, u in ((e, k), (f, v))
            )
            logits = torch.einsum("rlhk,rmhk->rhlm", q.to(wide) * (D // H) ** -0.5, k)
            y = torch.einsum("rhlm,rmhk->rlhk", logits.softmax(-1), v)
        return self.out(y.reshape(R, L, D).to(x_RLD.dtype), there)


@MIXERS.register("linformer")
class LinformerConfig(EvenHeadsConfig):
    """Linformer: bidirectional, documents up to a fixed length."""

    kind: Literal["linformer"] = "linformer"
    mixtures: Annotated[int, Field(gt=0, description="k of the paper: 128 or 256")] = 128
    max_len: Annotated[int, Field(gt=0, description="longest document")] = 512
    share: Literal["none", "heads", "key_value"] = "heads"

    layer = Linformer
    small = {"heads": 2, "mixtures": 3, "max_len": 16}
