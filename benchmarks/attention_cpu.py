"""Attention on one CPU thread against the variants of SDPA.

Forward and backward, medians of interleaved pairs, in processor time (one thread: other jobs add
little to it).

    OMP_NUM_THREADS=1 python benchmarks/attention_cpu.py [--length 4096] [--repeats 7] [--only NAME]

Each case names what SDPA would need for the same result (a mask or bias of all scores; for soft-cap
and gradients of a bias it has none: there the eager softmax is the peer) and prints
ours / peer: the median of the ratios of pairs timed one after the other, and its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.model.positions.alibi import slopes

CAUSAL = MaskSpec(causal=True)
Case = tuple[str, Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float = 0.0) -> Tensor:
    logits = torch.einsum("rthk,rshk->rhts", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    return torch.einsum("rhts,rshv->rthv", (logits + bias).softmax(-1), v)


def cases(T: int, heads: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    q, k, v = (make(1, T, heads, width) for _ in range(3))
    qkv = [q, k, v]
    past = torch.ones(T, T, dtype=torch.bool).tril()
    causal = torch.zeros(T, T).masked_fill(~past, -math.inf)
    yield "causal", lambda: attention(q, k, v, CAUSAL), lambda: sdpa(q, k, v, None, True), qkv

    yield "no mask", lambda: attention(q, k, v), lambda: sdpa(q, k, v), qkv

    near = past.triu(-255)
    yield (
        "window of 256",
        lambda: attention(q, k, v, MaskSpec(causal=True, window=256)),
        lambda: sdpa(q, k, v, near),
        qkv,
    )
    document = torch.arange(T).div(T / 4, rounding_mode="floor").int()[None] + 1
    same = past & (document[0][:, None] == document[0])
    rows = lambda x: x.view(4, T // 4, heads, width)
    yield (
        "4 documents, a row each",
        lambda: attention(rows(q), rows(k), rows(v), CAUSAL).view(1, T, heads, width),
        lambda: sdpa(q, k, v, same),
        qkv,
    )
    yield (
        "4 documents in one row",
        lambda: attention(q, k, v, CAUSAL._replace(document_RT=document, document_RS=document)),
        lambda: sdpa(q, k, v, same),
        qkv,
    )
    prefix = (torch.arange(T) < T // 4).int()[None]
    yield (
        "prefix of a quarter",
        lambda: attention(q, k, v, CAUSAL._replace(prefix_RT=prefix, prefix_RS=prefix)),
        lambda: sdpa(q, k, v, past | (prefix[0][:, None] & prefix[0]).bool()),
        qkv,
    )
    place = torch.arange(T)[None]
    slope = torch.tensor(slopes(heads))
    ramp = -slope * place[..., None]
    line = -slope[:, None, None] * (place.T - place).abs()
    yield (
        "ALiBi",
        lambda: attention(q, k, v, CAUSAL, ScoreSpec(fade_RTH=ramp, fade_RSH=ramp)),
        lambda: sdpa(q, k, v, line + causal),
        qkv,
    )
    kept = F.logsigmoid(torch.randn(1, T, heads) + 3).requires_grad_()

    def fox() -> Tensor:
        faded = kept.cumsum(1)
        return attention(q, k, v, CAUSAL, ScoreSpec(fade_RTH=faded, fade_RSH=faded))

    def fox_dense() -> Tensor:
        faded = kept.cumsum(1).transpose(1, 2)
        return sdpa(q, k, v, -(faded[..., None] - faded[..., None, :]).abs() + causal)

    yield "forget gate, its gradient", fox, fox_dense, [*qkv, kept]
    table = torch.randn(257, heads, requires_grad=True)
    relative = ScoreSpec(relative_NH=table, position_RT=place, position_RS=place)
    yield (
        "relative bias, its gradient",
        lambda: attention(q, k, v, CAUSAL, relative),
        lambda: sdpa(
            q,
            k,
            v,
            F.embedding((place.T - place).clamp(-128, 128) + 128, table).movedim(-1, 0)[None]
            + causal,
        ),
        [*qkv, table],
    )
    sink = torch.zeros(heads, requires_grad=True)

    def sunk_dense() -> Tensor:
        column = sink.view(1, heads, 1, 1).expand(1, heads, T, 1)
        pad = lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))
        mask = torch.cat((column, causal.expand(1, heads, T, T)), -1)
        return sdpa(q, pad(k), pad(v), mask)

    yield (
        "sinks, their gradient",
        lambda: attention(q, k, v, CAUSAL, ScoreSpec(sink_H=sink)),
        sunk_dense,
        [*qkv, sink],
    )
    yield (
        "soft-cap (peer: eager)",
        lambda: attention(q, k, v, CAUSAL, ScoreSpec(softcap=30.0)),
        lambda: eager(q, k, v, causal, 30.0),
        qkv,
    )


def seconds(f: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    begin = time.process_time()
    y = f()
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    return time.process_time() - begin


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics (the whole range of fewer than 6)."""
    ordered, n = sorted(ratios), len(ratios)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[low], ordered[n - 1 - low]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, ours, peer, leaves in cases(
        options.length, options.heads, options.width, torch.float32
    ):
        if options.only not in name:
            continue
        with torch.no_grad():
            torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-4)
        pairs = [(seconds(ours, leaves), seconds(peer, leaves)) for _ in range(options.repeats + 1)]
        mine, theirs = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
        ratios = [a / b for a, b in pairs[1:]]
        low, high = interval(ratios)
        found[name] = {
            "ms": mine * 1e3,
            "peer_ms": theirs * 1e3,
            "ratio": statistics.median(ratios),
            "low": low,
            "high": high,
        }
        sys.stdout.write(
            f"{name:28} {mine * 1e3:8.1f} ms   peer {theirs * 1e3:8.1f} ms   "
            f"{statistics.median(ratios):.3f}x [{low:.3f}, {high:.3f}]\n"
        )
        sys.stdout.flush()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "torch": torch.__version__, **found}, file)


if __name__ == "__main__":
    main()
