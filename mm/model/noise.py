"""Noise as a pure function of (seed, visit, name): recomputation and resume draw the same."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from mm.model.layer import Ctx


def generator(ctx: Ctx, name: str, device: torch.device) -> torch.Generator:
    """A generator of its own for one use of one layer call (``name`` tells the uses apart)."""
    seed = int(ctx.seed) * 0x9E3779B97F4A7C15 + ctx.visit * 0xD1B54A32D192ED03
    seed += zlib.crc32(name.encode())
    return torch.Generator(device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def dropout(x: Tensor, p: float, ctx: Ctx, name: str) -> Tensor:
    """Zero a share ``p`` of ``x`` and scale the rest by 1 / (1 - p).

    Source: Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from
    overfitting, sec. 4 (inverted form).
    """
    drawn = torch.rand(x.shape, generator=generator(ctx, name, x.device), device=x.device)
    return x * ((drawn >= p) / (1 - p)).to(x.dtype)
