"""Factorised residual quantisation: each book chooses by angle, in a narrow projection of its own.

N vectors, Q books, K codes, D latent, d width of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mm.batch import Sum
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import (
    Projection,
    Quantized,
    Quantizer,
    full_precision,
    straight_through,
    usage,
)
from mm.tokenizers.quantizers.vq import EmaCodebook, EmaCodebookConfig


class CosineCodebook(EmaCodebook):
    """Codes of any length, of which the one at the smallest angle is chosen."""

    def nearest(self, x_ND: Tensor) -> Tensor:
        codes = F.normalize(self.codes.to(x_ND.dtype), dim=-1)
        return (codes.square().sum(-1) - 2 * F.normalize(x_ND, dim=-1) @ codes.t()).argmin(-1)


class Book(nn.Module):
    """One book between two matrices."""

    def __init__(self, config: FactorizedRvqConfig):
        super().__init__()
        c = config
        self.inner, self.out = Projection(c.d, c.d_code), Projection(c.d_code, c.d)
        self.codes = c.book(c.d_code, CosineCodebook)


class FactorizedResidualVectorQuantizer(Quantizer):
    """Q books in a row, each of what the books before it left of the latent.

    Codes follow the mean of what chose them, as in `rvq`; the paper trains them by gradient.

    Source: Kumar et al. 2023 (arXiv:2306.06546), section 3.2; Yu et al. 2021 (arXiv:2110.04627),
    section 3.2 (factorised and normalised codes).
    """

    def __init__(self, config: FactorizedRvqConfig):
        super().__init__()
        c = config
        self.n_codebooks, self.codebook_size, self.d = c.n_codebooks, c.codebook_size, c.d
        self.books = nn.ModuleList(Book(c) for _ in range(c.n_codebooks))

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """See `Quantizer.forward`; a dropped book has id -1 and adds nothing.

        aux: usage; commitment (mean over d and over the books in use, summed over vectors);
        ``<q>/ema`` and ``<q>/candidates``, of dropped books too.
        """
        used = self.n_codebooks if n_books is None else max(1, min(int(n_books), self.n_codebooks))
        with full_precision(z) as full:
            flat = full.reshape(-1, self.d)
            weight = flat.new_ones(len(flat)) if valid is None else valid.reshape(-1).to(flat.dtype)
            left, error, ids, aux = flat, flat.new_zeros(()), [], {}
            quantised = torch.zeros_like(flat)
            book: Any
            for q, book in enumerate(self.books):
                narrow = book.inner(left)
                chosen = book.codes.nearest(narrow.detach())
                codes = book.codes.lookup(chosen).to(flat.dtype)
                if self.training:
                    sums = book.codes.statistics(narrow, chosen, weight)
                    aux |= {f"{q}/{name}": value for name, value in sums.items()}
                wide = book.out(straight_through(narrow, codes))
                left = left - wide
                if q < used:
                    error = error + ((narrow - codes).square().mean(-1) * weight).sum() / used
                    quantised = quantised + wide
                ids.append(chosen)
            ids_NQ = torch.stack(ids, dim=-1)
            aux["usage"] = usage(ids_NQ, self.codebook_size, valid)
            aux["commitment"] = Sum(error, weight.sum().detach())
            books = torch.arange(self.n_codebooks, device=ids_NQ.device)
            ids_NQ = ids_NQ.masked_fill(books >= used, -1)
            out = full if bypass else quantised.view_as(full)
        return Quantized(out.to(z.dtype), ids_NQ.view(*z.shape[:-1], self.n_codebooks), aux)

    def decode(self, ids: Tensor) -> Tensor:
        """``(..., k)`` ids of the first k <= Q books to ``(..., D)``.

        A negative id adds nothing.
        """
        first: Any = self.books[0]
        dtype = first.codes.codes.dtype
        z = torch.zeros(*ids.shape[:-1], self.d, device=ids.device, dtype=dtype)
        book: Any
        for q, book in enumerate(list(self.books)[: ids.shape[-1]]):
            code = ids[..., q].long()
            z = z + book.out(book.codes.lookup(code.clamp_min(0))) * (code >= 0)[..., None]
        return z

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        book: Any
        for q, book in enumerate(self.books):
            book.codes.update(stats, prefix=f"{q}/")

    def code_vectors(self) -> Tensor:
        """(Q * K, D) float32: the codes of each book, in the width of the latent."""
        books: Any = self.books
        return torch.cat([book.out(book.codes.codes) for book in books]).float()


@QUANTIZERS.register("factorized_rvq")
class FactorizedRvqConfig(EmaCodebookConfig):
    """Residual VQ by angle in projections. DAC: 9 to 32 books of 1024 codes of width 8."""

    kind: Literal["factorized_rvq"] = "factorized_rvq"  # type: ignore[assignment]
    n_codebooks: Annotated[int, Field(gt=0)] = 2
    d: Annotated[int, Field(gt=0, description="width of the latent")] = 32
    d_code: Annotated[int, Field(gt=0, description="width of a code")] = 8

    def build(self) -> FactorizedResidualVectorQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return FactorizedResidualVectorQuantizer(self)

    @classmethod
    def smallest(cls) -> FactorizedRvqConfig:
        return cls(codebook_size=8, d=4, d_code=3)
