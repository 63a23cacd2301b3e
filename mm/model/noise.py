"""Noise as a function of (seed, layer, visit, name): recomputation and resume draw the same."""

from __future__ import annotations

import random
import zlib

import torch
from torch import Tensor

from mm.kernels import dropout as kernel
from mm.model.context import Ctx
from mm.model.layer import Layer, Linear

STEP_SEED = "step_seed"  # key of `Ctx.scheduled`: a number of the step, equal on all ranks


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def generator(
    ctx: Ctx, layer: Layer | Linear | None, name: str, device: torch.device
) -> torch.Generator:
    """A generator of its own for one use of one layer call.

    Args:
        layer: who draws; None: something that all layers of a pass draw alike.
        name: tells the uses of one call apart.
    """
    seed = int(ctx.seed) * 0x9E3779B97F4A7C15
    if layer is not None:
        seed += ctx.visit * 0xD1B54A32D192ED03 + _hash(layer.path) * 0x8CB92BA72F3D8DD7
    seed += _hash(name)
    return torch.Generator(device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)


def drawn_of_step(ctx: Ctx, name: str) -> float | None:
    """In [0, 1): the same in all layers, micro-batches and passes of a step, on all ranks.

    None: nobody seeded the step, as a trainer does (`STEP_SEED` of `Ctx.scheduled`).
    """
    seed = ctx.scheduled.get(STEP_SEED)
    return None if seed is None else random.Random(f"{name} {int(seed)}").random()


def dropout(x: Tensor, p: float, ctx: Ctx, layer: Layer | Linear, name: str) -> Tensor:
    """Zero a share ``p`` of ``x``, to 1 / 65,536, and scale the rest by 1 / (1 - p)."""
    lost = min(round(p * kernel.LEVELS), kernel.LEVELS - 1)
    drawn = _drawn(x, ctx, layer, name)  # type: ignore[reportCallIssue]  the decorator has no types
    return kernel.dropout(x, drawn, lost)


@torch.compiler.disable  # a graph holds no generator
def uniform(n: int, ctx: Ctx, layer: Layer | Linear, name: str, device: torch.device) -> Tensor:
    """`(n,)` float32 in [0, 1)."""
    return torch.rand(n, generator=generator(ctx, layer, name, device), device=device)


@torch.compiler.disable  # a graph holds no generator
def _drawn(x: Tensor, ctx: Ctx, layer: Layer | Linear, name: str) -> Tensor:
    """Uniform int16, one for each element of ``x`` at least."""
    # Four 16-bit draws from each 64-bit word: a quarter of the generator's work.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    if ctx.shard is not None:  # other noise in each slice of a row
        name = f"{name}.{ctx.shard.rank}"
    words.random_(-(2**63), None, generator=generator(ctx, layer, name, x.device))
    return words.view(torch.int16)
