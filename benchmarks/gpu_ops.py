"""Packed attention, recurrences and convolutions on a GPU beside the kernels of others.

Peers that are not installed are left out by name: fla (flash-linear-attention), mamba_ssm,
causal_conv1d. T tokens, H heads of K, D channels.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
Way = Callable[..., Tensor]
TOKENS, H, G, K, D, N = 8192, 16, 4, 128, 4096, 16
DOCUMENTS = 12
PEERS = ("fla", "mamba_ssm", "causal_conv1d")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def new(*shape: int, dtype: torch.dtype = torch.bfloat16, device: Any = "cuda") -> Tensor:
    """Small random values with a gradient."""
    return (0.1 * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def packed_attention(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """Causal attention of documents in one row."""
    from mm.kernels.attention import attention
    from mm.kernels.attention.spec import MaskSpec

    each = T // DOCUMENTS
    number = torch.arange(T, device=device) // each
    document = number.int()[None] + 1
    starts = torch.arange(0, T, each, device=device)
    ends = torch.cat((starts, torch.full((1,), T, device=device))).int()
    # As `mm.model.length_buckets` makes it of a packed row.
    spec = MaskSpec(causal=True, document_RT=document, document_RS=document, starts_M=ends)

    def by_triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with attention.using("triton"):
            return attention(q, k, v, spec)

    ways: dict[str, Way] = {
        "mm, as picked": lambda q, k, v: attention(q, k, v, spec), "mm, triton": by_triton
    }  # fmt: skip
    if importlib.util.find_spec("torch.nn.attention.varlen"):

        def by_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from torch.nn.attention.varlen import varlen_attn

            more = each + T % each
            flat = (x[0] for x in (q, k, v))
            grouped: Any = {"window_size": (-1, 0), "enable_gqa": True}
            return varlen_attn(*flat, ends, ends, more, more, **grouped)[None]  # type: ignore

        ways["torch varlen"] = by_varlen

    def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flex()(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=_mask(T, each, device),
                       enable_gqa=True).transpose(1, 2)  # fmt: skip

    ways["FlexAttention"] = by_flex
    heads = (H, G, G)
    return tuple(new(1, T, h, K, device=device) for h in heads), ways


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def _mask(T: int, each: int, device: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    seen = lambda b, h, i, j: (i >= j) & (i // each == j // each)
    return create_block_mask(seen, None, None, T, T, device=torch.device(device).type)


def scalar_decay(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """Linear attention with one decay a head: RetNet, Mamba-2, mLSTM."""
    from mm.kernels.linear_attention import linear_attention

    ways: dict[str, Way] = {"mm": lambda q, k, v, g: linear_attention(q, k, v, -g.abs())[0]}
    if has("fla"):

        def by_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

            return chunk_simple_gla(q, k, v, g=-g.abs(), scale=1.0)[0]

        ways["fla simple_gla"] = by_fla
    return (*_heads(T, device), new(1, T, H, dtype=torch.float32, device=device)), ways


def channel_decay(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """Linear attention with one decay a channel: GLA, RWKV-6."""
    from mm.kernels.linear_attention import linear_attention

    ways: dict[str, Way] = {"mm": lambda q, k, v, g: linear_attention(q, k, v, -g.abs())[0]}
    if has("fla"):

        def by_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

            return chunk_gla(q, k, v, g=-g.abs(), scale=1.0)[0]

        ways["fla gla"] = by_fla
    return (*_heads(T, device), new(1, T, H, K, dtype=torch.float32, device=device)), ways


def delta(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """The gated delta rule."""
    from mm.kernels.delta_rule import delta_rule

    unit = lambda k: torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
    ways: dict[str, Way] = {
        "mm": lambda q, k, v, b, g: delta_rule(q, unit(k), v, b.sigmoid(), -g.abs())[0]
    }
    if has("fla"):

        def by_fla(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> Tensor:
            from fla.ops.gated_delta_rule import (  # type: ignore[import-not-found]
                chunk_gated_delta_rule,
            )

            rule = chunk_gated_delta_rule
            return rule(q, unit(k), v, g=-g.abs(), beta=b.sigmoid(), scale=1.0)[0]

        ways["fla gated_delta_rule"] = by_fla
    gates = (new(1, T, H, dtype=torch.float32, device=device) for _ in range(2))
    return (*_heads(T, device), *gates), ways


def _heads(T: int, device: Any) -> tuple[Tensor, ...]:
    return tuple(new(1, T, H, K, device=device) for _ in range(3))


def scan(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """Mamba's selective scan, steps positive."""
    from mm.kernels.selective_scan import selective_scan

    ways: dict[str, Way] = {
        "mm": lambda u, dt, a, b, c, d: selective_scan(u, dt.abs(), -a.abs(), b, c, d)[0]
    }
    if has("mamba_ssm"):

        def by_mamba(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
                selective_scan_fn,
            )

            last = lambda x: x.transpose(1, 2)
            y = selective_scan_fn(
                last(u), last(dt.abs()), -a.abs().T.contiguous(), last(b), last(c), d
            )
            return last(y)

        ways["mamba_ssm"] = by_mamba
    wide = lambda *shape: new(*shape, dtype=torch.float32, device=device)
    return (
        *(new(1, T, D, device=device) for _ in range(2)), wide(N, D),
        *(new(1, T, N, device=device) for _ in range(2)), wide(D),
    ), ways  # fmt: skip


def conv(T: int, device: Any) -> tuple[tuple[Tensor, ...], dict[str, Way]]:
    """A short causal convolution of one document."""
    from mm.kernels.causal_conv import causal_conv

    document = torch.ones(1, T, dtype=torch.int32, device=device)
    ways: dict[str, Way] = {"mm": lambda u, w, b: causal_conv(u, w, b, document)}
    if has("causal_conv1d"):

        def by_peer(u: Tensor, w: Tensor, b: Tensor) -> Tensor:
            from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

            rows = lambda x: x.to(u.dtype).contiguous()
            return causal_conv1d_fn(u.transpose(1, 2), rows(w.T), rows(b)).transpose(1, 2)

        ways["causal_conv1d"] = by_peer
    wide = lambda *shape: new(*shape, dtype=torch.float32, device=device)
    return (new(1, T, D, device=device), wide(4, D), wide(D)), ways


CASES = {
    f"attention of {DOCUMENTS} documents": packed_attention,
    "linear attention, a decay a head": scalar_decay,
    "linear attention, a decay a channel": channel_decay,
    "gated delta rule": delta,
    "selective scan": scan,
    "causal convolution": conv,
}


def rows(seconds_of: Callable[[Any], float]) -> Iterator[Row]:
    """Forward, and forward with backward, of each op by each that is here, bf16.

    A peer's largest difference from ours, over ours: what is timed must be the same.
    """
    for name, case in CASES.items():
        given, ways = case(TOKENS, "cuda")
        ours = None
        for by, run in ways.items():
            row: Row = {"op": name, "by": by}
            try:
                y = run(*given).detach()
                ours = y if ours is None else ours
                row["difference"] = float((y - ours).abs().max() / ours.abs().max())
                row["forward ms"] = 1e3 * seconds_of(functools.partial(run, *given))
                row["both ms"] = 1e3 * seconds_of(functools.partial(_both, run, *given))
            except Exception as error:  # the others are timed
                row["state"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            yield row


def _both(run: Way, *given: Tensor) -> None:
    run(*given).sum().backward()


def lines() -> Iterator[str]:
    """What would run, and our forms on fake tensors."""
    from mm.plan.fake_cuda import CUDA, fake_cuda

    absent = [name for name in PEERS if not has(name)]
    for name, case in CASES.items():
        with fake_cuda():
            given, ways = case(768, CUDA)
            ours = next(iter(ways.values()))
            assert ours(*given).device.type == "cuda"
        yield f"{name}: {', '.join(ways)}"
    if absent:
        yield f"not installed, left out: {', '.join(absent)}"
