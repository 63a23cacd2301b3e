"""The one interface of all quantizers, and the figures that are read off their histograms.

Q books, K codes, D latent.

A forward mutates no buffer. What training needs besides the loss (histograms, EMA sums, restart
candidates) leaves as `Sum`s in ``aux``, is summed over micro-batches and ranks by the trainer, and
comes back through `after_step`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mm.batch import Sum


class Quantized(NamedTuple):
    """What a quantizer makes of latents."""

    z: Tensor  # (..., D) quantised, gradient passes straight through; in the dtype of the input
    ids: Tensor  # (..., Q) int64 in [0, K)
    # "usage" always; "commitment" or "entropy" with gradient; EMA statistics while training
    aux: dict[str, Sum]


class Quantizer(nn.Module):
    """Plug point: latents ``(..., d)`` to ``n_codebooks`` ids each and back."""

    n_codebooks: int
    codebook_size: int
    d: int

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return next((t.device for t in (*self.buffers(), *self.parameters())), torch.device("cpu"))

    def forward(
        self,
        z: Tensor,
        *,
        valid: Tensor | None = None,
        n_books: int | None = None,
        bypass: bool = False,
        seed: Tensor | int = 0,
    ) -> Quantized:
        """Quantise.

        Args:
            z: (..., d) latents of any float dtype; the arithmetic is fp32 or wider, under autocast
                too.
            valid: (...) bool; False is padding, which gets ids but enters no statistic and no loss.
            n_books: use the first ``n_books`` codebooks only (quantizer dropout); others do as if
                they were absent.
            bypass: return the latents as the decoder would see them, but not quantised (warm-up);
                ids and statistics are computed as always, so that codebooks are ready when the
                warm-up ends.
            seed: of counter-based noise, so that recomputation draws the same.
        """
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """``(..., Q)`` integer ids to ``(..., d)`` float32 latents."""
        raise NotImplementedError

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        """Apply globally summed aux statistics after an optimizer step."""

    def code_vectors(self) -> Tensor:
        """``(Q * K, d)`` float32, book by book: which codes are alike."""
        ids = torch.arange(self.codebook_size, device=self.device)
        return self.decode(ids[:, None].expand(-1, self.n_codebooks))


class Projection(nn.Linear):
    """A matrix in the precision of what it reads: a quantizer's arithmetic is fp32 or wider."""

    def init_weights(self) -> None:
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


@contextlib.contextmanager
def full_precision(z: Tensor) -> Iterator[Tensor]:
    """Yield ``z`` as fp32 (fp64 stays) with autocast off.

    Nearest-code search in bf16 collapses codebooks.
    """
    with torch.autocast(device_type=z.device.type, enabled=False):
        yield z if z.dtype == torch.float64 else z.float()


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """Value of ``quantised``, gradient of ``z``. Source: Bengio et al. 2013, arXiv:1308.3432."""
    return z + (quantised - z).detach()


def usage(ids: Tensor, codebook_size: int, valid: Tensor | None = None) -> Sum:
    """Histogram of ids as a Sum: total ``(Q, K)`` float32, count ``(Q, 1)`` float32.

    Args:
        ids: (..., Q) integer ids; a negative id (a book that was dropped) is not counted.
        valid: (...) bool mask of what counts.
    """
    Q = ids.shape[-1]
    flat = ids.reshape(-1, Q)
    counted = flat >= 0
    if valid is not None:
        counted = counted & valid.reshape(-1, 1)
    place = flat.clamp_min(0) + torch.arange(Q, device=ids.device) * codebook_size
    total = torch.zeros(Q * codebook_size, device=ids.device)
    total = total.index_add(0, place.reshape(-1), counted.reshape(-1).to(total.dtype))
    total = total.view(Q, codebook_size)
    return Sum(total, total.sum(1, keepdim=True))


def usage_share(histogram: Tensor | np.ndarray) -> np.ndarray:
    """Share of codes in use, ``(Q,)`` in [0, 1], of a ``(Q, K)`` histogram."""
    h = np.atleast_2d(np.asarray(histogram, np.float64))
    return (h > 0).mean(1)


def perplexity(histogram: Tensor | np.ndarray) -> np.ndarray:
    """exp(entropy) of each book, ``(Q,)`` in [1, K], of a ``(Q, K)`` histogram.

    1 where nothing was counted.
    """
    h = np.atleast_2d(np.asarray(histogram, np.float64))
    p = h / np.maximum(h.sum(1, keepdims=True), 1e-12)
    return np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(1))
