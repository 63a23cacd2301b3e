"""Lookup-free quantisation: the signs of the latents are the bits of the id.

C channels, G groups.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mm.batch import Sum
from mm.config import Config
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    full_precision,
    straight_through,
    usage,
)


class LookupFreeQuantizer(Quantizer):
    """Codes are the corners of {-1, 1}^bits; an entropy penalty keeps them in use.

    Source: Yu et al. 2023 (MAGVIT-v2), arXiv:2310.05737, eq. 3-5. The batch entropy of eq. 5 needs
    the joint distribution over all codes; above ``group`` bits it is summed over groups of bits, as
    in arXiv:2409.04410.
    """

    place: Tensor

    def __init__(self, config: LfqConfig):
        super().__init__()
        self.n_codebooks, self.codebook_size, self.d = 1, 2**config.bits, config.bits
        self.config = config
        self.register_buffer("place", torch.empty(config.bits, dtype=torch.int64), persistent=False)

    def init_weights(self) -> None:
        """Fill the place values of the bits."""
        self.place.copy_(2 ** torch.arange(self.d))

    def entropy_penalty(self, flat: Tensor, weight: Tensor) -> Sum:
        """Eq. 5, ``E[H(q(z))] - H(E[q(z)])`` in nats, of ``(N, C)`` latents.

        The second part is no sum over vectors: it is taken over the vectors of this call, so
        cutting a batch into micro-batches changes it (the objective is exempt from the
        `micro-batches` law with this quantizer).
        """
        n = weight.sum()
        logit = 4 * flat / self.config.temperature  # -|z - c|^2 / t of +1 less that of -1
        each = batch = flat.new_zeros(())
        for some in logit.split(self.config.group, dim=-1):
            log_p = flat.new_zeros(len(some), 1)
            for bit in some.unbind(-1):
                both = torch.stack((F.logsigmoid(-bit), F.logsigmoid(bit)), -1)
                log_p = (log_p[:, :, None] + both[:, None, :]).flatten(1)
            p = log_p.exp()
            mean = (p * weight[:, None]).sum(0) / n.clamp_min(1e-12)
            each = each - ((p * log_p).sum(-1) * weight).sum()
            batch = batch - (mean * mean.clamp_min(1e-12).log()).sum()
        return Sum(each - self.config.diversity * n * batch, n.detach())

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """See `Quantizer.forward`. aux.

        Usage, entropy, commitment (mean over bits, summed over vectors).
        """
        with full_precision(z) as full:
            bits = full > 0
            hard = bits.to(full.dtype) * 2 - 1
            ids = (bits.long() * self.place).sum(-1, keepdim=True)
            flat = full.reshape(-1, self.d)
            weight = flat.new_ones(len(flat)) if valid is None else valid.reshape(-1).to(flat.dtype)
            error = (flat - hard.reshape(flat.shape)).square().mean(-1)
            aux = {
                "usage": usage(ids, self.codebook_size, valid),
                "commitment": Sum((error * weight).sum(), weight.sum().detach()),
                "entropy": self.entropy_penalty(flat, weight),
            }
            out = full if bypass else straight_through(full, hard)
        return Quantized(out.to(z.dtype), ids, aux)

    def decode(self, ids: Tensor) -> Tensor:
        return (ids[..., :1].long() // self.place % 2).float() * 2 - 1


@QUANTIZERS.register("lfq")
class LfqConfig(Config):
    """Lookup-free quantisation."""

    kind: Literal["lfq"] = "lfq"
    bits: Annotated[int, Field(ge=1, le=20, description="the codebook has 2**bits codes")] = 10
    temperature: Annotated[
        float, Field(gt=0, description="of the soft assignment in the penalty")
    ] = 1.0
    diversity: Annotated[
        float, Field(ge=0, description="weight of the batch entropy in the penalty")
    ] = 1.0
    group: Annotated[
        int, Field(ge=1, le=12, description="bits whose joint distribution is formed")
    ] = 10

    def build(self) -> LookupFreeQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return LookupFreeQuantizer(self)

    @classmethod
    def smallest(cls) -> LfqConfig:
        return cls(bits=4)
