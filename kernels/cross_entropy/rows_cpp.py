"""The two passes of `linear_cross_entropy` over a chunk of logits, by the C++ kernel.

P tokens, C classes of the chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.kernels import compiler

if TYPE_CHECKING:
    from mm.kernels.cross_entropy import Rows, Running

SOURCE = Path(__file__).with_name("rows.cpp")
NARROW = True  # logits are read and gradients written as the products have them
SERIAL = 1 << 16  # logits of a chunk below which threads cost more than they save


def _shape(logits: Tensor, at: int, softcap: float) -> tuple[int, int, int, float, int]:
    threads = torch.get_num_threads() if logits.numel() > SERIAL else 1
    P, C = logits.shape
    return P, C, at, float(softcap), threads


def absorb(logits: Tensor, at: int, softcap: float, run: Running, keep: bool) -> None:
    """`mm.kernels.cross_entropy.Passes.absorb`."""
    name = f"rows_{compiler.SUFFIX[logits.dtype]}_absorb"
    rows = (logits, run.target, run.lse, run.own)
    compiler.call(SOURCE, name, *rows, *_shape(logits, at, softcap))


def gradient(logits: Tensor, at: int, softcap: float, rows: Rows, kept: bool) -> Tensor:
    """`mm.kernels.cross_entropy.Passes.gradient`."""
    name = f"rows_{compiler.SUFFIX[logits.dtype]}_gradient"
    out = torch.empty_like(logits) if kept else logits
    wide = [x.to(rows.lse.dtype).contiguous() for x in rows[1:]]
    compiler.call(SOURCE, name, logits, rows.target, *wide, out, *_shape(logits, at, softcap))
    return out
