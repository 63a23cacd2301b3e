"""Split residual quantisation: two chains of books side by side, each in a width of its own.

Q books, K codes, D latent, d width of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Sum
from mm.registry import QUANTIZERS
from mm.tokenizers.quantizers.base import Projection, Quantized, Quantizer, full_precision
from mm.tokenizers.quantizers.rvq import ResidualVectorQuantizer, RvqConfig


class SplitResidualVectorQuantizer(Quantizer):
    """The first ``n_first`` books and the others both code the latent, not what the first left.

    What they decode to is added up. In Mimi the first book is distilled from a model of speech.

    Source: Defossez et al. 2024, "Moshi" (arXiv:2410.00037), section 3.3.2, "split RVQ".
    """

    def __init__(self, config: SplitRvqConfig):
        super().__init__()
        c = config
        self.n_codebooks, self.codebook_size, self.d = c.n_codebooks, c.codebook_size, c.d
        self.n_first = c.n_first
        make = lambda n: Projected(c.d, c.d_code, c.chain(n).build())
        self.first = make(c.n_first)
        self.rest = make(c.n_codebooks - c.n_first)

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """See `Quantizer.forward`; ``n_books`` counts over both chains, the first never drops.

        aux: as of `rvq`, names begin with first/ and rest/; usage and commitment over all books.
        """
        used = self.n_codebooks if n_books is None else int(n_books)
        rest = used - self.n_first
        with full_precision(z) as full:
            a = self.first(full, valid=valid, bypass=bypass, seed=seed)
            b = self.rest(full, valid=valid, n_books=max(rest, 1), bypass=bypass, seed=seed)
            ids_b = b.ids if rest > 0 else torch.full_like(b.ids, -1)
            one, two = (dict(part.aux) for part in (a, b))
            usage = [aux.pop("usage") for aux in (one, two)]
            loss = [aux.pop("commitment") for aux in (one, two)]
            aux = {f"first/{k}": v for k, v in one.items()}
            aux |= {f"rest/{k}": v for k, v in two.items()}
            aux["usage"] = Sum(*(torch.cat(pair) for pair in zip(*usage, strict=True)))
            heard = 1.0 if rest > 0 else 0.0
            aux["commitment"] = Sum(loss[0].total + heard * loss[1].total, loss[0].count)
            out = a.z + heard * b.z
        return Quantized(out.to(z.dtype), torch.cat([a.ids, ids_b], -1), aux)

    def decode(self, ids: Tensor) -> Tensor:
        """``(..., k)`` ids of the first k <= Q books to ``(..., D)``.

        A negative id adds nothing.
        """
        z = self.first.decode(ids[..., : self.n_first])
        return z + self.rest.decode(ids[..., self.n_first :])

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        for name, part in (("first/", self.first), ("rest/", self.rest)):
            part.chain.after_step(
                {k.removeprefix(name): v for k, v in stats.items() if k.startswith(name)}
            )

    def code_vectors(self) -> Tensor:
        """(Q * K, D) float32: the codes of each book, in the width of the latent."""
        return torch.cat([p.out(p.chain.code_vectors()) for p in (self.first, self.rest)]).float()


class Projected(nn.Module):
    """A chain of books between two matrices without biases."""

    def __init__(self, d: int, d_code: int, chain: ResidualVectorQuantizer):
        super().__init__()
        self.inner = Projection(d, d_code, bias=False)
        self.out = Projection(d_code, d, bias=False)
        self.chain = chain

    def forward(self, z: Tensor, **settings: object) -> Quantized:
        """(..., D) to the same, by the codes of its projection."""
        coded = self.chain(self.inner(z), **settings)
        return Quantized(self.out(coded.z), coded.ids, coded.aux)

    def decode(self, ids: Tensor) -> Tensor:
        """(..., k) ids to (..., D)."""
        return self.out(self.chain.decode(ids))


@QUANTIZERS.register("split_rvq")
class SplitRvqConfig(RvqConfig):
    """Two chains of residual VQ. Mimi: 32 books, 1 of them first, 2048 codes of width 256."""

    kind: Literal["split_rvq"] = "split_rvq"  # type: ignore[assignment]
    n_codebooks: Annotated[int, Field(gt=1, description="of both chains")] = 4
    n_first: Annotated[int, Field(gt=0, description="of the first chain")] = 1
    d: Annotated[int, Field(gt=0, description="width of the latent")] = 64
    d_code: Annotated[int, Field(gt=0, description="width of a code")] = 32
    normalize: Literal["layer", "l2", "none"] = "none"

    @model_validator(mode="after")
    def _both_chains(self) -> SplitRvqConfig:
        if self.n_first >= self.n_codebooks:
            raise ValueError(f"n_first {self.n_first} leaves no book of {self.n_codebooks}")
        return self

    def chain(self, n: int) -> RvqConfig:
        """Of one chain of ``n`` books."""
        own = {"kind": "rvq", "n_codebooks": n, "d": self.d_code}
        same = {name: getattr(self, name) for name in RvqConfig.model_fields if name not in own}
        return RvqConfig(**same, **own)

    def build(self) -> SplitResidualVectorQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return SplitResidualVectorQuantizer(self)

    @classmethod
    def smallest(cls) -> SplitRvqConfig:
        return cls(n_codebooks=3, codebook_size=8, d=4, d_code=4)
