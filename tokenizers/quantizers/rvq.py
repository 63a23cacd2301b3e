"""Residual vector quantisation: every book codes what the books before it left over.

N vectors, Q books, K codes, D latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Sum
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    full_precision,
    straight_through,
    usage,
)
from mm.tokenizers.quantizers.vq import EmaCodebookConfig, normalize_latents


class ResidualVectorQuantizer(Quantizer):
    """Q EMA codebooks in a row; the first k of them decode to a coarser version of the same latent.

    Code 0 of every book after the first is the zero vector, so one more book can never make a
    vector's error larger; ``zero_code`` false leaves it to training.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1 and section III-C (k-means start,
    dead codes, quantizer dropout); Defossez et al. 2022, arXiv:2210.13438, section 3.2 (commitment
    of each residual, straight-through once).
    """

    def __init__(self, config: RvqConfig):
        super().__init__()
        self.n_codebooks, self.codebook_size, self.d = (
            config.n_codebooks,
            config.codebook_size,
            config.d,
        )
        self.normalize, self.zero_code = config.normalize, config.zero_code
        self.books = nn.ModuleList(config.book(config.d) for _ in range(config.n_codebooks))

    def init_weights(self) -> None:
        """Runs after the books have filled themselves."""
        self._zero_codes()

    def _zero_codes(self) -> None:
        for book in list(self.books)[1:] if self.zero_code else ():
            book.codes[0].zero_()  # type: ignore[union-attr, operator]

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """See `Quantizer.forward`.

        A dropped book has id -1 and adds nothing to ``z`` and to the loss.

        aux: usage; commitment (mean over D and over the books in use, summed over vectors);
        ``<q>/ema`` and ``<q>/candidates``. Dropped books are measured and follow their residuals
        all the same, so the names do not change from step to step.
        """
        used = self.n_codebooks if n_books is None else max(1, min(int(n_books), self.n_codebooks))
        with full_precision(z) as full:
            x = normalize_latents(full, self.normalize)
            flat = x.reshape(-1, self.d)
            weight = flat.new_ones(len(flat)) if valid is None else valid.reshape(-1).to(flat.dtype)
            done = torch.zeros_like(flat)  # sum of the codes so far, without gradient
            quantised, error, ids, aux = done, flat.new_zeros(()), [], {}
            for q, book in enumerate(self.books):
                residual = flat - done
                chosen = book.nearest(residual.detach())  # type: ignore[operator]
                codes = book.lookup(chosen).to(flat.dtype)  # type: ignore[operator]
                if self.training:
                    sums = book.statistics(residual, chosen, weight)  # type: ignore[operator]
                    aux |= {f"{q}/{name}": value for name, value in sums.items()}
                if q < used:
                    error = error + ((residual - codes).square().mean(-1) * weight).sum() / used
                done = done + codes
                ids.append(chosen)
                if q == used - 1:
                    quantised = done
            ids_NQ = torch.stack(ids, dim=-1)
            aux["usage"] = usage(ids_NQ, self.codebook_size, valid)
            aux["commitment"] = Sum(error, weight.sum().detach())
            ids_NQ = ids_NQ.masked_fill(
                torch.arange(self.n_codebooks, device=ids_NQ.device) >= used, -1
            )
            out = x if bypass else straight_through(x, quantised.view_as(x))
        return Quantized(out.to(z.dtype), ids_NQ.view(*z.shape[:-1], self.n_codebooks), aux)

    def decode(self, ids: Tensor) -> Tensor:
        """``(..., k)`` ids of the first k <= Q books to ``(..., D)``.

        A negative id adds nothing.
        """
        z = torch.zeros(*ids.shape[:-1], self.d, device=ids.device, dtype=self.books[0].codes.dtype)  # type: ignore[arg-type]
        for q, book in enumerate(list(self.books)[: ids.shape[-1]]):
            code = ids[..., q].long()
            z = z + book.lookup(code.clamp_min(0)) * (code >= 0)[..., None]  # type: ignore[operator]
        return z

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Move every book by its own sums."""
        for q, book in enumerate(self.books):
            book.update(stats, prefix=f"{q}/")  # type: ignore[operator]
        self._zero_codes()

    def code_vectors(self) -> Tensor:
        """(Q * K, D) float32: the codes of each book (of residuals from the second on)."""
        return torch.cat([book.codes for book in self.books]).float()  # type: ignore[list-item, misc]


@QUANTIZERS.register("rvq")
class RvqConfig(EmaCodebookConfig):
    """Residual VQ. Bits of one latent: n_codebooks * log2(codebook_size)."""

    kind: Literal["rvq"] = "rvq"  # type: ignore[assignment]
    n_codebooks: Annotated[int, Field(gt=0)] = 2
    d: Annotated[int, Field(gt=0, description="width of a code")] = 32
    normalize: Literal["layer", "l2", "none"] = "layer"
    zero_code: Annotated[bool, Field(description="keep a zero vector in each later book")] = True

    def build(self) -> ResidualVectorQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return ResidualVectorQuantizer(self)

    @classmethod
    def smallest(cls) -> RvqConfig:
        return cls(codebook_size=8, d=4)
