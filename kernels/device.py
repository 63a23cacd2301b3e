"""Which tensors Triton kernels take, and how."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"
KIND = "cuda"  # the tests' interpreter says "cpu"
# Capabilities that tiles are made for: A100; workstation cards, with 99 KB of shared memory a block
# (RTX 30, 40 and 50, A10, L4, L40); H100 and H200; B200.
CARDS = (80, 86, 90, 100)
SMALL = (86, 89, 120, 121)  # capabilities of those with 99 KB
OLDEST = 80  # before it there is no bf16
CARD: int | None = None  # the tests' builds say one of them


def card_like(capability: int) -> int:
    """Return which of `CARDS` has the tiles of a card of this compute capability (86 is 8.6)."""
    if capability in SMALL:
        return 86
    return max(each for each in (80, 90, 100) if each <= max(capability, OLDEST))


def capability(index: int | None = None) -> int | None:
    """Compute capability of a device, the current one by default; None without one."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(index)  # torch.compile takes it for a constant
    return 10 * card.major + card.minor


def card() -> int:
    """Return which of `CARDS` the current device is; without one 90, which plans are made for."""
    if CARD is not None:
        return CARD
    return card_like(capability() or 90)


def why_not(*args: Any, **kw: Any) -> str | None:
    """Reason why no Triton kernel can take these arguments, or None.

    What is no tensor is skipped.
    """
    for t in (*args, *kw.values()):
        if isinstance(t, Tensor) and t.device.type != KIND:
            return f"needs a {KIND} device: tensors are on {t.device.type}"
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in DTYPES:
            return f"no {t.dtype}"
    if KIND == "cuda" and (found := capability()) is not None and found < OLDEST:
        return f"needs compute capability 8.0 or newer: this card has {found // 10}.{found % 10}"
    return _MISSING


def why_empty(*tensors: Tensor) -> str | None:
    """Reason why there is nothing to launch, or None."""
    return "nothing to launch" if any(0 in x.shape for x in tensors) else None


def promote(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to one dtype that the matrix instructions multiply."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def product_dtype(x: Tensor) -> torch.dtype:
    """What a mixer should give a chunked recurrence that multiplies ``x``.

    On a GPU the dtype of ``x``, whose matrix instructions sum in float32. The CPU's forms multiply
    float32 or wider: there rounding would cost bits and time for nothing.
    """
    return x.dtype if x.device.type == KIND else torch.promote_types(x.dtype, torch.float32)
