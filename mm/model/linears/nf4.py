"""Weights of four bits that stay as they are: what adapters are trained upon.

N elements of a matrix, K blocks of 64, L blocks of 256 blocks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.kernels.device import DTYPES
from mm.kernels.op import KernelUnavailable, Op, without_autocast
from mm.model.context import Ctx
from mm.model.layer import Linear
from mm.registry import LINEARS

BLOCK, OUTER = 64, 256
MISSING = (
    None
    if find_spec("bitsandbytes")
    else "it is not installed: pip install 'mm-stack[bitsandbytes]'"
)
# Quantiles of the normal distribution, scaled to [-1, 1], with 0 among them: QLoRA, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Nf4(Linear):
    """A matrix in four-bit NormalFloat, 4.5 bits a weight, or 4.13 with ``double``.

    It does not learn. The scales are kept as bytes, so that no precision of training rounds them.

    Source: Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3 and appendix E: blocks of 64
    by their largest magnitude; ``double``: these, less their mean, as 8-bit floats (e4m3) in blocks
    of 256.
    """

    wide_parameters = ()

    def __init__(self, d_in: int, d_out: int, name: str = "", double: bool = False):
        super().__init__()
        _load_bitsandbytes()
        self.name, self.doubly, self.shape = name, double, (d_out, d_in)
        n = d_in * d_out
        K = -(-n // BLOCK)
        L = -(-K // OUTER)
        empty = lambda size: torch.empty(size, dtype=torch.uint8)
        self.codes: Tensor
        self.scales: Tensor
        self.outer: Tensor | None
        self.register_buffer("codes", empty(K * BLOCK // 2))
        self.register_buffer("scales", empty(K if double else 4 * K))
        self.register_buffer("outer", empty(4 * (L + 1)) if double else None)

    def init_weights(self) -> None:
        fresh = torch.randn(self.shape, device=self.codes.device) * self.shape[1] ** -0.5
        self._set(fresh)

    def rescale(self, factor: float) -> None:
        self._set(self.matrix() * factor)

    def _set(self, weight: Tensor) -> None:
        with torch.no_grad():
            for name, value in self.from_dense({"weight": weight}).items():
                getattr(self, name).copy_(value)

    def from_dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Quantize ``weight``; a bias has no place here and keeps its name."""
        codes, largest = quantize(tensors["weight"])
        out = {k: v for k, v in tensors.items() if k != "weight"} | {"codes": codes}
        if not self.doubly:
            return out | {"scales": _bytes(largest)}
        mean = largest.mean()
        blocks = F.pad(largest - mean, (0, -len(largest) % OUTER)).view(-1, OUTER)
        top = torch.finfo(torch.float8_e4m3fn).max
        outer = (blocks.abs().amax(1) / top).clamp_min(torch.finfo(torch.float32).tiny)
        eight = (blocks / outer[:, None]).flatten()[: len(largest)].to(torch.float8_e4m3fn)
        return out | {"scales": _bytes(eight), "outer": _bytes(torch.cat((outer, mean[None])))}

    def matrix(self) -> Tensor:
        """`(d_out, d_in)` float32."""
        return dequantize(self.codes, self.scales, self.outer, self.shape)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        return nf4_linear(x, self.codes, self.scales, self.outer, self.shape)


class _Product(torch.autograd.Function):
    """``x W^T``, whose backward makes the matrix anew: kept till then it would cost 32 bits."""

    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        return F.linear(x, dequantize(codes, scales, outer, shape).to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scales, outer, ctx.shape = inputs
        ctx.save_for_backward(codes, scales, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (codes, scales, outer) = grads, ctx.saved_tensors
        weight = dequantize(codes, scales, outer, ctx.shape)
        return grad @ weight.to(grad.dtype), None, None, None, None


@Op
def nf4_linear(
    x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Return ``x W^T`` of a matrix in four bits, which gets no gradient.

    Args:
        x: `(..., d_in)` any float dtype, to which the matrix is rounded.
        codes: as of `dequantize`, and so are ``scales``, ``outer`` and ``shape``, (d_out, d_in).
    Returns:
        `(..., d_out)` in the dtype of ``x``; that of autocast inside it.
    """
    y: Any = _Product.apply(x, codes, scales, outer, shape)
    return y


def _why_not_bitsandbytes(
    x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor | None, shape: tuple[int, int]
) -> str | None:
    if MISSING or x.dtype not in DTYPES:
        return MISSING or f"no {x.dtype}"
    if x.device.type == "cuda":
        return None
    if x.device.type != "cpu":
        return f"no device of kind {x.device.type}"
    if shape[1] % BLOCK:  # 0.50.2 takes scales of other blocks there
        return f"wrong on a CPU where rows of {shape[1]} are no whole blocks of {BLOCK}"
    if nf4_linear.by_name != "bitsandbytes":
        return "on a CPU taken by name alone: MM_NF4_LINEAR=bitsandbytes"
    return None


@nf4_linear.register("bitsandbytes", _why_not_bitsandbytes)
def _bitsandbytes(
    x: Tensor, codes: Tensor, scales: Tensor, outer: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Its products upon the same tensors: e4m3 is one of the 256-entry codes that it takes."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]
    from bitsandbytes.functional import QuantState  # pyright: ignore[reportMissingImports]

    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    nested: dict[str, Any] = {}
    if outer is None:
        largest = scales.view(torch.float32)
    else:
        largest, floats = scales, outer.view(torch.float32)
        e4m3 = torch.arange(256, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
        inner = QuantState(floats[:-1], code=e4m3.float(), blocksize=OUTER, dtype=torch.float32)
        nested = {"offset": floats[-1], "state2": inner}
    state = QuantState(
        largest, torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=x.dtype, **nested
    )
    packed = codes[: -(-shape[0] * shape[1] // 2)].view(-1, 1)
    with without_autocast(device):
        return bitsandbytes.matmul_4bit(x, packed, state)  # pyright: ignore[reportPrivateImportUsage]


def _load_bitsandbytes() -> None:
    """Import it where it will run: before the first step, and without what it would fetch.

    Its CPU backend takes code from a hub where the package `kernels` is installed.

    Raises:
        KernelUnavailable: it was asked for by name and is not installed.
    """
    asked = nf4_linear.by_name == "bitsandbytes"
    if asked and MISSING:
        raise KernelUnavailable(f"MM_NF4_LINEAR=bitsandbytes: {MISSING}")
    if MISSING or "bitsandbytes" in sys.modules or not (asked or torch.cuda.is_available()):
        return
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, hub = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)  # it warns that it could not
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401 # pyright: ignore[reportMissingImports]
    finally:
        log.setLevel(before)
        del sys.modules["kernels"]
        if hub is not None:
            sys.modules["kernels"] = hub


def dequantize(
    codes: Tensor, scales: Tensor, outer: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """`(d_out, d_in)` float32.

    Args:
        codes: `(K * 32,)` uint8, two of them each.
        scales: bytes of K float32; with ``outer`` those of K e4m3.
        outer: bytes of L scales of these, and of their mean, float32.
        shape: of the matrix.
    """
    if outer is None:
        largest = scales.view(torch.float32)
    else:
        *factors, mean = outer.view(torch.float32).split([len(outer) // 4 - 1, 1])
        eight = scales.view(torch.float8_e4m3fn).float()
        largest = eight * factors[0].repeat_interleave(OUTER)[: len(eight)] + mean
    # A byte's two levels by one look-up: with an index a code it takes three times the memory
    both = torch.tensor([(a, b) for a in LEVELS for b in LEVELS], device=codes.device)
    flat = F.embedding(codes.int(), both).view(-1, BLOCK).mul_(largest[:, None]).flatten()
    return flat[: shape[0] * shape[1]].view(shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte `(ceil(N / 64) * 32,)` uint8, and the largest magnitudes `(K,)` float32."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=flat.device)
    borders = (levels[1:] + levels[:-1]) / 2
    scaled = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, borders).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], largest


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@LINEARS.register("nf4")
class Nf4Config(Config):
    """Four-bit NormalFloat matrices that do not learn; `lora` upon them is QLoRA."""

    kind: Literal["nf4"] = "nf4"
    double: bool = Field(default=False, description="quantize the scales of the blocks, too")

    def build(self, d_in: int, d_out: int, name: str = "") -> Nf4:
        return Nf4(d_in, d_out, name, self.double)
