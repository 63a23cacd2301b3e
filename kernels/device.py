"""Which tensors Triton kernels take, and how."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"
KIND = "cuda"  # the tests' interpreter says "cpu"


def why_not(*args: Any, **kw: Any) -> str | None:
    """Reason why no Triton kernel can take these arguments, or None.

    What is no tensor is skipped.
    """
    for t in (*args, *kw.values()):
        if isinstance(t, Tensor) and t.device.type != KIND:
            return f"needs a {KIND} device: tensors are on {t.device.type}"
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in DTYPES:
            return f"no {t.dtype}"
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
