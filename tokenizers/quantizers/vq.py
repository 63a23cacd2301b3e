"""Vector quantisation with an EMA codebook. N vectors, K codes, D latent.

Everything that changes the codebook is a sum over vectors, so it may come from any number of
micro-batches and ranks:

- ``ema``: sum of the vectors of each code, and their number.
- ``candidates``: one drawn vector a code, for the first filling and for restarts. A draw is not a
  sum, but a mean under heavy-tailed weights is one: with ``w = u**-p`` of uniform ``u`` the largest
  of any number of weights holds on average ``1 - 1/p`` of their total (max share of an alpha-stable
  sum, alpha = 1/p), so total/count is one vector with a pinch of others, and no contributor needs
  to know how many there are. ``u`` is a continuous pseudo-random function of the vector itself, the
  code and the update number, hence it does not matter how a batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
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

POWER, FLOOR = (
    5.0,
    1e-6,
)  # weights up to 1e30: sums of thousands of them times a latent stay inside fp32


class EmaCodebook(nn.Module):
    """K code vectors that follow the mean of what is assigned to them. One level of VQ and of RVQ.

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1 (EMA); Dhariwal et al. 2020,
    arXiv:2005.00341 and Zeghidour et al. 2021, arXiv:2107.03312 (k-means start, restart of dead
    codes).
    """

    codes: Tensor
    size: Tensor
    probe: Tensor
    updates: Tensor

    def __init__(
        self,
        n_codes: int,
        d: int,
        *,
        decay: float = 0.99,
        kmeans_steps: int = 10,
        restart_below: float = 0.1,
        unit: bool = False,
    ):
        """Allocate.

        Args:
            decay: of the moving averages, once the k-means start is over.
            kmeans_steps: first updates that are Lloyd iterations, each on its own step's vectors.
            restart_below: a code whose share falls below this part of the even share 1/K is dead
                and moves to a drawn vector; 0 switches restarts off.
            unit: codes live on the unit sphere (inputs must be normalised too).
        """
        super().__init__()
        self.decay, self.kmeans_steps = decay, kmeans_steps
        self.restart_below, self.unit = restart_below, unit
        self.register_buffer("codes", torch.empty(n_codes, d))
        self.register_buffer("size", torch.empty(n_codes))  # EMA share of vectors, sums to 1
        self.register_buffer("probe", torch.empty(d, n_codes))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64))

    def init_weights(self) -> None:
        """Fill the buffers: random codes (the first update replaces them), even shares."""
        generator = torch.Generator().manual_seed(20171102)
        for buffer, scale in ((self.codes, 1.0), (self.probe, 4.0)):
            if buffer.device.type != "meta":
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * scale)
        if self.unit:
            self.codes.copy_(F.normalize(self.codes, dim=-1))
        self.size.fill_(1 / self.size.numel())
        self.updates.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move like any module, but never below fp32.

        `engine.precision: bf16` converts whole modules.
        """
        kept = {
            name: b
            for name, b in self._buffers.items()
            if b is not None and b.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new is not None and new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device)
        return self

    def nearest(self, x_ND: Tensor) -> Tensor:
        """Index of the nearest code, ``(N,)`` int64."""
        codes = self.codes.to(x_ND.dtype)
        # |x|^2 is the same for all codes
        return (codes.square().sum(-1) - 2 * x_ND @ codes.t()).argmin(-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """``(...)`` int64 ids to ``(..., D)`` codes."""
        return F.embedding(ids, self.codes)

    @torch.no_grad()
    def statistics(
        self, x_ND: Tensor, ids_N: Tensor, weight_N: Tensor | None = None
    ) -> dict[str, Sum]:
        """Sums that `update` wants, of vectors ``(N, D)`` assigned to ``(N,)`` ids.

        Weight 0 leaves a vector out.
        """
        x = x_ND.detach().float()
        w = torch.ones(len(x), device=x.device) if weight_N is None else weight_N.float()
        K, D = self.codes.shape
        total = torch.zeros(K, D, device=x.device).index_add(0, ids_N, x * w[:, None])
        count = torch.zeros(K, device=x.device).index_add(0, ids_N, w)
        # A triangle wave of a random projection: uniform in [0, 1] over vectors, and continuous.
        turn = (x @ self.probe.float() + self.updates * 0.6180339887498949) % 1.0
        u = (2 * turn - 1).abs().clamp_min(FLOOR)
        lot = u.pow(-POWER) * w[:, None]
        return {
            "ema": Sum(total, count[:, None]),
            "candidates": Sum(lot.t() @ x, lot.sum(0)[:, None]),
        }

    @torch.no_grad()
    def update(self, stats: Mapping[str, Sum], prefix: str = "") -> None:
        """Move the codes by globally summed `statistics` (named ``prefix + name``).

        Nothing happens without any.
        """
        if f"{prefix}ema" not in stats:
            return
        total, count = (t.to(self.codes) for t in stats[f"{prefix}ema"])
        count = count[:, 0]
        drawn = stats[f"{prefix}candidates"]
        # Branch-free, so that no value has to come to the host.
        n = count.sum()
        even = 1 / len(count)
        share = count / n.clamp_min(1e-12)
        candidates = (drawn.total / drawn.count.clamp_min(1e-30)).to(self.codes)
        mean = total / count.clamp_min(1e-12)[:, None]
        # EMA of sums over EMA of counts, written as one blend
        size = self.decay * self.size + (1 - self.decay) * share
        blend = ((1 - self.decay) * share / size.clamp_min(1e-12))[:, None]
        codes = self.codes + blend * (mean - self.codes)
        dead = size < self.restart_below * even
        codes = torch.where(dead[:, None], candidates, codes)
        # twice the bar: a restarted code gets some dozen updates to prove itself
        size = torch.where(dead, 2 * self.restart_below * even, size)
        size = size / size.sum()
        # Lloyd iterations: a code that won nothing moves to a drawn vector at once.
        lloyd = self.updates <= self.kmeans_steps
        won = (count > 0) & (self.updates > 0)
        codes = torch.where(lloyd, torch.where(won[:, None], mean, candidates), codes)
        size = torch.where(lloyd, torch.full_like(size, even), size)
        if self.unit:
            codes = F.normalize(codes, dim=-1)
        self.codes.copy_(torch.where(n > 0, codes, self.codes))
        self.size.copy_(torch.where(n > 0, size, self.size))
        self.updates += (n > 0).to(self.updates)


class EmaCodebookConfig(Config):
    """What every quantizer of `EmaCodebook`s sets."""

    kind: str = ""
    codebook_size: Annotated[int, Field(gt=1)] = 512
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    kmeans_steps: Annotated[
        int, Field(ge=0, description="first updates that are Lloyd iterations")
    ] = 10
    restart_below: Annotated[float, Field(ge=0, lt=0.5, description="part of the even share")] = 0.1

    def book(
        self, d: int, made: type[EmaCodebook] = EmaCodebook, *, unit: bool = False
    ) -> EmaCodebook:
        """One codebook, of codes of width ``d``."""
        return made(
            self.codebook_size,
            d,
            decay=self.decay,
            kmeans_steps=self.kmeans_steps,
            restart_below=self.restart_below,
            unit=unit,
        )


class VectorQuantizer(Quantizer):
    """One EMA codebook behind a normalisation of the latents.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1-3; l2 variant: Yu et al. 2021,
    arXiv:2110.04627, sec. 3.2.
    """

    def __init__(self, config: VqConfig):
        super().__init__()
        self.n_codebooks, self.codebook_size, self.d = 1, config.codebook_size, config.d
        self.normalize = config.normalize
        self.book = config.book(config.d, unit=config.normalize == "l2")

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

        Usage, commitment (mean over D, summed over vectors), ema, candidates.
        """
        with full_precision(z) as full:
            x = normalize_latents(full, self.normalize)
            flat = x.reshape(-1, self.d)
            weight = flat.new_ones(len(flat)) if valid is None else valid.reshape(-1).to(flat.dtype)
            ids = self.book.nearest(flat.detach())
            codes = self.book.lookup(ids).to(flat.dtype)
            error = (flat - codes).square().mean(-1)
            aux = {
                "usage": usage(ids[:, None], self.codebook_size, valid),
                "commitment": Sum((error * weight).sum(), weight.sum().detach()),
            }
            if self.training:
                aux |= self.book.statistics(flat, ids, weight)
            out = x if bypass else straight_through(x, codes.view_as(x))
        return Quantized(out.to(z.dtype), ids.view(*z.shape[:-1], 1), aux)

    def decode(self, ids: Tensor) -> Tensor:
        return self.book.lookup(ids[..., 0].long())

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        self.book.update(stats)


def normalize_latents(x: Tensor, how: str) -> Tensor:
    """``(..., D)`` latents on a fixed scale.

    "layer" (zero mean, unit variance), "l2" (unit length) or "none".

    Without it commitment and reconstruction can agree on ever smaller latents, and the codebook
    collapses.
    """
    if how == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return F.normalize(x, dim=-1) if how == "l2" else x


@QUANTIZERS.register("vq")
class VqConfig(EmaCodebookConfig):
    """EMA codebook with k-means start and restart of dead codes."""

    kind: Literal["vq"] = "vq"  # type: ignore[assignment]
    d: Annotated[int, Field(gt=0, description="width of a code")] = 16
    normalize: Literal["layer", "l2", "none"] = "layer"

    def build(self) -> VectorQuantizer:
        """Allocate the quantizer; `mm.model.layer.init_weights` fills it."""
        return VectorQuantizer(self)

    @classmethod
    def smallest(cls) -> VqConfig:
        return cls(codebook_size=8, d=4)
