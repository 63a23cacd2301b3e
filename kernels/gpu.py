"""Which tensors Triton kernels take."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def why_not(*tensors: Tensor | None) -> str | None:
    """Reason why no Triton kernel can take these tensors (None entries are skipped), or None."""
    for t in tensors:
        if t is not None and t.device.type != "cuda":
            return f"tensors are on {t.device.type}"
        if t is not None and t.is_floating_point() and t.dtype not in DTYPES:
            return f"no {t.dtype}"
    return _missing()
