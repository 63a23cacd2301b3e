"""P4 to P7: operations and mixers against peers that compute the same. T tokens."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from cpu_peers import (
    fla_simple_gla,
    transformers,
)
from measure import (
    PATIENCE,
    Figure,
    Missing,
    at_least,
    at_most,
    backward,
    ratios,
)
from torch import Tensor

from mm.bench.mixers import Bench, names
from mm.kernels.delta_rule import delta_rule
from mm.kernels.linear_attention import linear_attention
from mm.kernels.linear_scan import linear_scan


def heads(T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values `(1, T, 4, 64)` and log decays `(1, T, 4)`."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 4, 64, generator=g) for _ in range(3))
    return q, F.normalize(k, dim=-1), v, -0.1 * torch.rand(1, T, 4, generator=g)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def p4() -> Iterator[Figure]:
    transformers()
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    for T, bar, anchor in ((4096, 0.60, ".55"), (16384, 0.20, ".14")):
        q, k, v, g = heads(T)
        beta = torch.rand_like(g)
        ours = lambda q, k, v, g, b: delta_rule(q, k, v, b, g, scale=0.125)[0]
        theirs = lambda q, k, v, g, b: torch_chunk_gated_delta_rule(q, k, v, g, b)[0]
        (found,) = ratios(backward(ours, q, k, v, g, beta), backward(theirs, q, k, v, g, beta))
        yield at_most("P4", f"gated delta / HF chunked form, T={T}", bar, anchor, found)


def p5() -> Iterator[Figure]:
    scalar = lambda q, k, v, g: linear_attention(q * 0.125, k, v, g)[0]
    q, k, v, g = heads(16384)
    by_channel = g[..., None].expand(-1, -1, -1, 64).contiguous()
    found = ratios(
        backward(sdpa, q, k, v), backward(scalar, q, k, v, g), backward(scalar, q, k, v, by_channel)
    )
    yield at_least("P5", "causal SDPA / scalar decay, T=16384", 20, "29.6", found[0])
    yield at_least("P5", "causal SDPA / vector decay, T=16384", 20, "8 to 21", found[1])
    peer = fla_simple_gla()
    for T, bar, anchor in ((4096, 0.45, ".37"), (16384, 0.15, ".11")):
        q, k, v, g = heads(T)
        theirs = backward(lambda *x: peer(*x)[0], q, k, v, g)
        (ratio,) = ratios(backward(scalar, q, k, v, g), theirs)
        yield at_most("P5", f"scalar decay / fla's chunked form, T={T}", bar, anchor, ratio)


def p6() -> Iterator[Figure]:
    """Every mixer whose state does not grow with length, but those that say they are sequential."""
    bench = Bench([1024, 16384])
    for name in names():
        layer = bench.build(name)
        if layer.caps.sequential or not layer.caps.causal or not layer.caps.length_general:
            continue
        if layer.state_bytes(1, 4096) > layer.state_bytes(1, 2048):
            continue
        short, _ = bench.cell(layer, 1024, warm=True)
        if short * 16 > PATIENCE[0]:  # not said to be sequential, and yet too slow to be measured
            yield at_most("P6", f"growth 1k-16k: {name}, too slow", 1.10, "1.03-1.07", math.inf)
            continue
        long, _ = bench.cell(layer, 16384, warm=False)
        bar = 1.15 if getattr(layer, "window", None) else 1.10
        growth = math.log(long / short) / math.log(16)
        yield at_most("P6", f"growth 1k-16k: {name}", bar, "1.03-1.07", growth)


def p7() -> Iterator[Figure]:
    if importlib.util.find_spec("mambapy") is None:
        raise Missing("mambapy")
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    for T in (1024, 4096):
        a, b = 0.9 + 0.1 * torch.rand(4, T, 512), torch.randn(4, T, 512)
        theirs = backward(lambda a, b: pscan(a[..., None], b[..., None])[..., 0], a, b)
        mine = lambda a, b: linear_scan(a, b)[0]
        plain = lambda a, b: linear_scan.implementations["loop"][0](a, b)[0]
        found = ratios(theirs, backward(mine, a, b), backward(plain, a, b))
        x, y = (ratio.inverse() for ratio in found)
        yield at_most("P7", f"linear scan / mambapy, 4x{T}x512", 0.30, ".15-.26", x)
        yield at_most("P7", f"its plain PyTorch / mambapy, 4x{T}x512", 1.0, ".39-.58", y)
