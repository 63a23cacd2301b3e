"""Cross-entropy of a linear layer without all its logits in memory.

P tokens, D width, N classes, C classes of a chunk.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler, device
from mm.kernels.cross_entropy import rows_cpp
from mm.kernels.fused import differentiable
from mm.kernels.op import Op

KEPT_BYTES = 64 << 20  # float32 probabilities that are kept for the backward when they are all
CHUNK_BYTES = 16 << 20  # float32 logits held at once otherwise: what the caches of a CPU hold
# On a GPU every chunk is two passes of launches, and its products read and write all of the
# hidden states' gradient, 12 bytes an element for 2 C operations: 1,024 classes take as long as
# that, 8,192 an eighth more. Memory bounds them from above, tiles of 128 classes divide them.
GPU_CHUNK_BYTES = 512 << 20
GPU_CLASSES = 8192
GPU_TILE = 128


def chunk_classes(tokens: int, classes: int, device: str = "cpu") -> int:
    """Classes whose logits are held at once, all of them when these are few enough to keep.

    At least 512 on the CPU, below which products lose speed; on a GPU at least 8,192, so that a
    batch of many tokens may hold more than `GPU_CHUNK_BYTES`, and chunks of nearly one size.
    """
    if device != "cuda":
        if 4 * tokens * classes <= KEPT_BYTES:
            return classes
        return min(classes, max(512, CHUNK_BYTES // (4 * tokens)))
    if 4 * tokens * classes <= GPU_CHUNK_BYTES:
        return classes
    most = max(GPU_CLASSES, GPU_CHUNK_BYTES // (4 * tokens) // GPU_TILE * GPU_TILE)
    each = -(-classes // -(-classes // most))
    return min(classes, -(-each // GPU_TILE) * GPU_TILE)


def _compute_dtype(h: Tensor) -> torch.dtype:
    """What matrix products run in: autocast decides, as it would for `F.linear`."""
    device = h.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and h.dtype != torch.float64
        else h.dtype
    )


@Op
def linear_cross_entropy(
    h_PD: Tensor,
    weight_ND: Tensor,
    target_P: Tensor,
    bias_N: Tensor | None = None,
    *,
    factor_P: Tensor | None = None,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Negative log-likelihood of each token's target under ``softmax(h @ weight.T + bias)``.

    Args:
        h_PD: `(P, D)` float hidden states; P may be 0.
        weight_ND: `(N, D)` float; products run in the autocast dtype when that is on, the softmax
            in float32 or wider.
        target_P: `(P,)` int in [0, N), or ``ignore_index``.
        bias_N: `(N,)` float or None.
        factor_P: `(P,)` float, multiplies each token's loss.
        ignore_index: tokens with this target have loss and gradient 0.
        z_loss: ``z_loss * log(Z) ** 2`` is added, Z the sum of the exponentials of the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
    Returns:
        `(P,)` float32 (float64 for float64 input), unreduced.
    Source: z-loss: Chowdhery et al. 2022 (arXiv:2204.02311), section 5; soft-cap: Gemma 2
    (arXiv:2408.00118), section 2.
    """
    dtype = _compute_dtype(h_PD)
    target, ignored = _target(target_P, ignore_index)
    with torch.autocast(h_PD.device.type, enabled=False):
        logits = h_PD.to(dtype) @ weight_ND.to(dtype).T
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if bias_N is not None:
            logits = logits + bias_N.to(logits.dtype)
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        nll = F.cross_entropy(logits, target, reduction="none")
        lse = logits.logsumexp(-1) if z_loss else nll
        return _weigh(nll, lse, ignored, factor_P, z_loss)


def _target(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    target = target.long()
    if ignore_index is None:
        return target, None
    ignored = target == ignore_index
    return target.masked_fill(ignored, 0), ignored


def _weigh(
    nll: Tensor, lse: Tensor, ignored: Tensor | None, factor: Tensor | None, z_loss: float
) -> Tensor:
    loss = nll + z_loss * lse.square() if z_loss else nll
    if factor is not None:
        loss = loss * factor.to(loss.dtype)
    return loss if ignored is None else loss.masked_fill(ignored, 0)


class Rows(NamedTuple):
    """What the gradient needs of each token, `(P,)` each."""

    target: Tensor
    lse: Tensor
    all: Tensor  # factor of its softmax
    own: Tensor  # factor of its target's one-hot


class Passes(Protocol):
    """The two passes over a chunk of logits `(P, C)` of classes ``at`` .. ``at + C``."""

    NARROW: bool  # logits may come in the dtype of the products; else in float32 or wider

    def absorb(self, logits: Tensor, at: int, softcap: float, run: Running, keep: bool) -> None:
        """Take the chunk into ``run``.

        ``keep``: it becomes the capped logits; else its content is lost.
        """

    def gradient(self, logits: Tensor, at: int, softcap: float, rows: Rows, kept: bool) -> Tensor:
        """Return ``rows.all * softmax - rows.own * one_hot``, through the soft-cap.

        It has the dtype of the chunk, which may be overwritten unless it is ``kept``.
        """
        ...


class Running:
    """Log-sum-exp and the target's logit of the chunks seen so far, `(P,)` each."""

    def __init__(self, target: Tensor, wide: torch.dtype):
        self.target = target
        self.lse = torch.full(target.shape, -torch.inf, dtype=wide, device=target.device)
        self.own = torch.zeros_like(self.lse)


class _Plain:
    NARROW: bool = False

    @staticmethod
    def absorb(logits: Tensor, at: int, softcap: float, run: Running, keep: bool) -> None:
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        C = logits.shape[1]
        inside = (run.target >= at) & (run.target < at + C)
        here = logits.gather(1, (run.target - at).clamp_(0, C - 1)[:, None])[:, 0]
        run.own = torch.where(inside, here, run.own)
        if keep:
            run.lse = torch.logsumexp(logits, -1)
            return
        top = logits.amax(-1, keepdim=True)
        total = logits.sub_(top).exp_().sum(-1)
        run.lse = torch.logaddexp(run.lse, total.log_().add_(top[:, 0]))

    @staticmethod
    def gradient(logits: Tensor, at: int, softcap: float, rows: Rows, kept: bool) -> Tensor:
        target, lse, all_P, own_P = rows
        slope = None
        if softcap:
            bent = logits.div_(softcap).tanh_()
            slope = 1 - bent.square()
            logits = bent.mul_(softcap)
        p = logits - lse[:, None] if kept else logits.sub_(lse[:, None])
        p = p.exp_().mul_(all_P[:, None])
        C = p.shape[1]
        inside = (target >= at) & (target < at + C)
        p.scatter_add_(
            1,
            (target - at).clamp_(0, C - 1)[:, None],
            torch.where(inside, -own_P, 0).to(p.dtype)[:, None],
        )
        return p if slope is None else p.mul_(slope)


def _module(name: str) -> Passes:
    if name == "plain":
        return _Plain()
    return cast("Passes", importlib.import_module(f"mm.kernels.cross_entropy.rows_{name}"))


def _logits_dtype(
    passes: str, dtype: torch.dtype, bias: Tensor | None, softcap: float
) -> torch.dtype:
    """That of the products where nothing is done to them before the softmax, else wider."""
    narrow = bias is None and not softcap and _module(passes).NARROW
    return dtype if narrow else torch.promote_types(dtype, torch.float32)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype, C: slice) -> Tensor:
    logits = (h @ w[C].to(h.dtype).T).to(dtype)
    return logits if bias is None else logits.add_(bias[C].to(dtype))


def _empties(
    passes: str, h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    dtype: torch.dtype, softcap: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    P, N = h.shape[0], weight.shape[0]
    nll = h.new_empty(P, dtype=torch.promote_types(dtype, torch.float32))
    keep = keep and max(1, chunk_classes(P, N, h.device.type)) == N
    kind = _logits_dtype(passes, dtype, bias, softcap)
    return nll, torch.empty_like(nll), nll.new_empty((P, N) if keep else (0,), dtype=kind)


def _forward(
    passes: str, h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    dtype: torch.dtype, softcap: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """nll, log Z, and the logits themselves when one chunk is all and ``keep`` says so."""
    with torch.autocast(h.device.type, enabled=False):
        h = h.to(dtype)
        (P, _), N = h.shape, weight.shape[0]
        wide = torch.promote_types(dtype, torch.float32)
        run, step = Running(target, wide), max(1, chunk_classes(P, N, h.device.type))
        keep = keep and step == N
        made = _logits_dtype(passes, dtype, bias, softcap)
        kept = torch.empty(0, dtype=made, device=h.device)
        for at in range(0, N, step):
            logits = _logits(h, weight, bias, made, slice(at, at + step))
            _module(passes).absorb(logits, at, softcap, run, keep)
            if keep:
                kept = logits
        return run.lse - run.own, run.lse, kept


def _backward(
    passes: str, h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    dtype: torch.dtype, softcap: float, lse: Tensor, kept: Tensor, dnll: Tensor, dlse: Tensor,
    ask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h, weight and bias, those that ``ask`` names: a frozen head has none."""
    with torch.autocast(h.device.type, enabled=False):
        x = h.to(dtype)
        (P, _), N, wide = h.shape, weight.shape[0], lse.dtype
        step = max(1, chunk_classes(P, N, h.device.type))
        dh = torch.zeros(h.shape, dtype=wide, device=h.device)
        dw = torch.empty_like(weight if ask[1] else h[:0], memory_format=torch.contiguous_format)
        db = torch.empty(0 if bias is None else N, dtype=wide, device=h.device)
        rows = Rows(target, lse, (dnll + dlse).to(wide), dnll)
        made = _logits_dtype(passes, dtype, bias, softcap)
        for at in range(0, N, step):
            C = slice(at, at + step)
            # What is kept is never overwritten: a graph may be walked twice.
            has = kept.numel() > 0
            logits = kept if has else _logits(x, weight, bias, made, C)
            g = _module(passes).gradient(logits, at, softcap, rows, has)
            if bias is not None:
                db[C] = g.sum(0)
            g = g.to(dtype)
            if ask[1] and dw.dtype == dtype:
                torch.mm(g.T, x, out=dw[C])
            elif ask[1]:
                dw[C] = g.T @ x
            if ask[0]:
                dh += g @ weight[C].to(dtype)
        return dh.to(h.dtype), dw, db if bias is None else db.to(bias.dtype)


def _why_not(
    passes: str, h: Tensor, weight: Tensor, target: Tensor, *_: Any, **__: Any
) -> str | None:
    if passes == "triton":
        return device.why_not(h, weight, target)
    if passes == "plain":
        return None
    kind = _compute_dtype(h)
    wrong = kind not in compiler.SUFFIX
    reason = f"no kernel for {kind}"
    return reason if wrong else compiler.why_not(rows_cpp.SOURCE, h, weight, target)


def _register(name: str, passes: str) -> None:
    op = differentiable(
        f"linear_cross_entropy_{name}",
        {"h": "Tensor", "weight": "Tensor", "target": "Tensor", "bias": "Tensor?"}
        | {"dtype": "ScalarType", "softcap": "float", "keep": "bool"},
        "nll lse",
        *(partial(f, passes) for f in (_empties, _forward, _backward)),
        kept="logits",
        saved="h weight target bias dtype softcap lse logits",
        gradients="h weight bias",
        ask=True,
    )

    @linear_cross_entropy.register(name, partial(_why_not, passes))
    def run(
        h_PD: Tensor,
        weight_ND: Tensor,
        target_P: Tensor,
        bias_N: Tensor | None = None,
        *,
        factor_P: Tensor | None = None,
        ignore_index: int | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        target, ignored = _target(target_P, ignore_index)
        keep = torch.is_grad_enabled() and (h_PD.requires_grad or weight_ND.requires_grad)
        dtype, cap = _compute_dtype(h_PD), softcap or 0.0
        nll, lse, _ = op(h_PD, weight_ND, target, bias_N, dtype, cap, keep and not softcap)
        with torch.autocast(h_PD.device.type, enabled=False):
            return _weigh(nll, lse, ignored, factor_P, z_loss)


for _name, _passes in (("chunked", "plain"), ("cpp", "cpp"), ("triton", "triton")):
    _register(_name, _passes)
