"""How fast each attention is on a card: a table, and the order of implementations it gives.

TFLOP/s of forward and backward together over the pairs that are seen (a causal mask: half of them),
3.5 times the forward's operations, at 8,192 tokens and more. Nothing here was measured by this
project: `make gpu` prints what it measures beside it. What has no row is slower than all that have
one: `SLOWEST`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mm.kernels import device
from mm.kernels.attention.spec import MaskSpec, ScoreSpec, find_set

# Everywhere, fastest first: PyTorch's own operators tile by tile, and all scores at once.
SLOWEST = ("blocks", "reference")
WIDTHS = (64, 128, 256)
# Up to so many pairs of a mask its dense form costs nothing, and launches decide: SDPA has fewest.
SMALL = 1 << 16


class Rate(NamedTuple):
    """TFLOP/s of an implementation, and where the figure comes from."""

    tflops: float
    source: str


def _rows(source: str, **rates: tuple[float, float, float]) -> dict[str, tuple[Rate, ...]]:
    """Of heads up to 64, 128 and 256 wide."""
    return {way: tuple(Rate(x, source) for x in three) for way, three in rates.items()}


FA2 = "published: flash-attention's README, forward + backward, 16k tokens; 256: estimated"
PROBED = "published: pytorch/pytorch#192799; FlashAttention of the same row there"
HOPPER = "derived: 1.7 times FlashAttention 2 (NX-AI/mlstm_kernels; huggingface PR 48163)"
AMPERE = "derived: .82 of FlashAttention 2 (huggingface/transformers PR 48163)"
GB200 = "derived: 19.96 ms at 2 x 16,384 tokens, 16 heads of 128 (fla's README); others: estimated"
SANA = "derived: 2.86 times FlashAttention 2, forward (sglang PR 33655); backward: estimated"
OURS = "estimated: .6 of FlashAttention 2, from the instructions of the built kernel"
SPARSE = "estimated: FlashAttention 2 of whole rows, less what short documents leave idle"
MASKED = "estimated: the memory-efficient kernel, which computes hidden pairs"
FLOATS = "estimated: three products of tf32 for one; ours in small tiles"

# card -> calls -> implementation -> rates by width. "plain": causal or full; "packed": documents,
# with a window or without; "window"; "scores": a soft-cap, a fade, a sink, a prefix; "float32".
RATES: dict[int, dict[str, dict[str, tuple[Rate, ...]]]] = {
    80: {
        "plain": _rows(FA2, sdpa=(171, 189, 150)) | _rows(AMPERE, cudnn=(140, 155, 123))
        | _rows(OURS, triton=(103, 113, 90)),
        "packed": _rows(SPARSE, varlen=(137, 151, 120)) | _rows(OURS, triton=(85, 95, 75))
        | _rows(MASKED, sdpa=(20, 20, 15)),
        "window": _rows(OURS, triton=(85, 95, 75)) | _rows(MASKED, sdpa=(20, 20, 15)),
        "scores": _rows(OURS, triton=(80, 85, 65)) | _rows(MASKED, sdpa=(20, 20, 15)),
        "float32": _rows(FLOATS, sdpa=(35, 35, 25), triton=(15, 12, 0)),
    },
    86: {
        "plain": _rows(PROBED, sdpa=(24, 24, 20), cudnn=(25, 25, 19))
        | _rows(OURS, triton=(14, 14, 10)),
        "packed": _rows(SPARSE, varlen=(19, 19, 15)) | _rows(OURS, triton=(12, 12, 9))
        | _rows(MASKED, sdpa=(4, 4, 3)),
        "window": _rows(OURS, triton=(12, 12, 9)) | _rows(MASKED, sdpa=(4, 4, 3)),
        "scores": _rows(OURS, triton=(11, 11, 8)) | _rows(MASKED, sdpa=(4, 4, 3)),
        "float32": _rows(FLOATS, sdpa=(8, 8, 6), triton=(4, 3, 0)),
    },
    90: {
        "plain": _rows(FA2, sdpa=(284, 328, 300)) | _rows(HOPPER, cudnn=(369, 527, 510))
        | _rows(OURS, triton=(170, 197, 150)),
        "packed": _rows(SPARSE, varlen=(227, 262, 240)) | _rows(OURS, triton=(140, 165, 125))
        | _rows(MASKED, sdpa=(35, 35, 25)),
        "window": _rows(OURS, triton=(140, 165, 125)) | _rows(MASKED, sdpa=(35, 35, 25)),
        "scores": _rows(OURS, triton=(130, 150, 110)) | _rows(MASKED, sdpa=(35, 35, 25)),
        "float32": _rows(FLOATS, sdpa=(60, 60, 40), triton=(30, 25, 0)),
    },
    100: {
        "plain": _rows(GB200, sdpa=(330, 386, 350)) | _rows(SANA, cudnn=(800, 1000, 0))
        | _rows(OURS, triton=(200, 230, 180)),
        "packed": _rows(SPARSE, varlen=(264, 309, 280)) | _rows(OURS, triton=(160, 185, 145))
        | _rows(MASKED, sdpa=(40, 40, 30)),
        "window": _rows(OURS, triton=(160, 185, 145)) | _rows(MASKED, sdpa=(40, 40, 30)),
        "scores": _rows(OURS, triton=(150, 170, 130)) | _rows(MASKED, sdpa=(40, 40, 30)),
        "float32": _rows(FLOATS, sdpa=(60, 60, 40), triton=(30, 25, 0)),
    },
}  # fmt: skip


def _fastest(rates: dict[str, tuple[Rate, ...]], column: int) -> tuple[str, ...]:
    return tuple(sorted(rates, key=lambda way: -rates[way][column].tflops))


# Sorted once: a call, and a graph that is traced, only look up.
ORDER: dict[tuple[int, str, int], tuple[str, ...]] = {
    (card, calls, width): (*_fastest(rates, column), *SLOWEST)
    for card, kinds in RATES.items()
    for calls, rates in kinds.items()
    for column, width in enumerate(WIDTHS)
}


def kind_of(q: Tensor, mask: MaskSpec, score: ScoreSpec) -> str:
    """Which rows of the table a call has."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "float32"
    if find_set(score, "softcap", "fade_RTH", "relative_NH", "bias_RHTS", "sink_H"):
        return "scores"
    if find_set(mask, "prefix_RT", "allowed_RTS"):
        return "scores"
    if mask.document_RT is not None:
        return "packed"
    return "plain" if mask.window is None else "window"


def _row_of(q: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec) -> tuple[int, str, int]:
    wide = max(q.shape[-1], v.shape[-1])
    width = 64 if wide <= 64 else 128 if wide <= 128 else 256
    return device.card(), kind_of(q, mask, score), width


def order(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec
) -> tuple[str, ...] | None:
    """Implementations on the current card, fastest first; None where the table says nothing.

    That is on a CPU, and of calls so small that launches decide.
    """
    if q.device.type != "cuda":
        return None
    if (mask.is_set() or score.sink_H is not None) and q.shape[1] * k.shape[1] <= SMALL:
        return None
    return ORDER[_row_of(q, v, mask, score)]


def rate(way: str, q: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec) -> Rate | None:
    """What the table says of an implementation at a call on the current card."""
    card, calls, width = _row_of(q, v, mask, score)
    rates = RATES[card][calls].get(way)
    return rates[WIDTHS.index(width)] if rates else None


def why(way: str, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec) -> str:
    """What speaks for an implementation that was chosen, for the log; "" where no rate decided."""
    if order(q, k, v, mask, score) is None:
        return ""
    found = rate(way, q, v, mask, score)
    if found is None:
        return "slower than all that have a rate, and able"
    return f"{found.tflops:g} TFLOP/s, {found.source.partition(':')[0]}"
