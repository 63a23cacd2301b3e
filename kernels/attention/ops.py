"""Attention in tiles (`blocks`, `flash_cpp`, `flash_triton`) as `torch.library` ops."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm.kernels.attention import blocks
from mm.kernels.attention.spec import FIELDS, MaskSpec, ScoreSpec, join, split
from mm.kernels.fused import define, differentiable, is_traced

GRADS = ("q", "k", "v", "bias_RHTS", "fade_RTH", "fade_RSH", "relative_NH", "sink_H")
_QKV = dict.fromkeys("qkv", "Tensor")


def _module(way: str) -> Any:
    """Import by the first call: Triton may be absent."""
    return importlib.import_module(f"mm.kernels.attention.{way}")


def _forward(way: str, q: Tensor, k: Tensor, v: Tensor, *specs: Any) -> tuple[Tensor, Tensor]:
    return _module(way).forward(q, k, v, *split(specs))


def _backward(way: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor | None]:
    *specs, y, lse, dy, ask = rest
    need = {name for name, wanted in zip(GRADS, ask, strict=True) if wanted}
    if "fade_RTH" in need or "fade_RSH" in need:  # both sides come together
        need |= {"fade_RTH", "fade_RSH"}
    made = _module(way).backward(q, k, v, *split(specs), y, lse, dy, need)
    return [made.get(name) for name in GRADS]


def _empties(q: Tensor, k: Tensor, v: Tensor, *specs: Any) -> tuple[Tensor, Tensor]:
    (R, T, H, _), G = q.shape, k.shape[2]
    wide = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(R, T, H, v.shape[-1]), v.new_empty(R * G, H // G, T, 1, dtype=wide)


_OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    way: differentiable(
        f"attention_{way}",
        _QKV | FIELDS,
        "y",
        _empties,
        functools.partial(_forward, way),
        functools.partial(_backward, way),
        kept="lse",
        saved=" ".join((*_QKV, *FIELDS, "y", "lse")),
        gradients=" ".join(GRADS),
        ask=True,
    )
    for way in ("blocks", "flash_cpp", "flash_triton")
}


def run(
    way: str, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp (which has no gradient) by the module ``way``."""
    return _OPS[way](q, k, v, *join(mask, score))


def _statistics(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *specs: Any) -> tuple[Tensor, Tensor]:
    return blocks.statistics(q, k, v, *split(specs), lse)


def _empty_statistics(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *specs: Any
) -> tuple[Tensor, Tensor]:
    R, T, H, _ = q.shape
    return lse.new_empty(R, H, k.shape[1]), lse.new_empty(R, H, T)


_schema = [f"{kind} {name}" for name, kind in (_QKV | {"lse": "Tensor"} | FIELDS).items()]
_, _traceable = define("attention_statistics", _schema, 2, _empty_statistics, _statistics)


def measure(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[Tensor, Tensor]:
    """Return `blocks.statistics`, without gradient."""
    given = (q, k, v, lse, *join(mask, score))
    given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    return _traceable(*given) if is_traced(given) else _statistics(*given)
