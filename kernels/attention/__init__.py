"""Softmax attention over rows: the reference, and the implementations that equal it.

A row holds ONE document, or several that ``allowed`` or ``document`` separates; mixers put each
document into its own row (`mm.model.varlen`), because a masked place still meets its neighbours as
``0 * value``, which is NaN when the value is inf.

R rows, T queries, S keys, H query heads, G key heads (G divides H), K key width, V value width,
N distances. ``Sides``: what is known of the queries `(R, T, ...)` and of the keys `(R, S, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler, device
from mm.kernels.attention import flash_cpp, ops
from mm.kernels.op import Op

Sides = tuple[Tensor | None, Tensor | None]


def _allowed(
    allowed: Tensor | None,
    causal: bool,
    T: int,
    S: int,
    device: torch.device,
    window: int | None = None,
    document: Sides = (None, None),
    prefix: Sides = (None, None),
) -> Tensor | None:
    """`(R or 1, T, S)` bool of all conditions, or None when everything is allowed."""
    seen = allowed
    if causal:
        late = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None]
        together = _together(prefix)
        late = late if together is None else late | together
        seen = late if seen is None else seen & late
    if window is not None:
        near = torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T - window + 1)[None]
        seen = near if seen is None else seen & near
    same = _together(document)
    if same is None:
        return seen
    return same if seen is None else seen & same


def _together(sides: Sides) -> Tensor | None:
    """`(R, T, S)`: the same number that is not zero."""
    q, k = sides
    if q is None or k is None:
        return None
    return (q[:, :, None] == k[:, None, :]) & (k != 0)[:, None, :]


def _added(
    bias: Tensor | None, fade: Sides, relative: Tensor | None, place: Sides
) -> Tensor | None:
    """What is added to the logits; broadcasts to `(R, H, T, S)`."""
    made = bias
    q, k = fade
    if q is not None and k is not None:
        faded = -(q.mT[..., :, None] - k.mT[..., None, :]).abs()
        made = faded if made is None else made + faded
    if relative is not None:
        assert place[0] is not None and place[1] is not None, "relative_NH needs places"
        far = relative.shape[0] // 2
        distance = place[0][:, :, None].long() - place[1][:, None, :].long()
        near = F.embedding(distance.clamp(-far, far) + far, relative).movedim(-1, 1)
        made = near if made is None else made + near
    return made


@Op
def attention(
    q_RTHK: Tensor,
    k_RSGK: Tensor,
    v_RSGV: Tensor,
    allowed_RTS: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    document_RT: Tensor | None = None,
    document_RS: Tensor | None = None,
    prefix_RT: Tensor | None = None,
    prefix_RS: Tensor | None = None,
    bias_RHTS: Tensor | None = None,
    gain_RHTS: Tensor | None = None,
    fade_RTH: Tensor | None = None,
    fade_RSH: Tensor | None = None,
    relative_NH: Tensor | None = None,
    place_RT: Tensor | None = None,
    place_RS: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    want: Sequence[str] = (),
) -> Any:
    """Attend within rows; a query that may see nothing gets zeros.

    Args:
        q_RTHK: `(R, T, H, K)` queries, any float dtype; scores and softmax are float32 or wider.
        k_RSGK: `(R, S, G, K)` keys; query head h reads key head ``h // (H // G)``.
        v_RSGV: `(R, S, G, V)` values.
        allowed_RTS: `(R or 1, T, S)` bool, True where the query may see the key; None = everywhere.
        causal: query t sees keys up to ``S - T + t`` (the last query sees all).
        window: query t sees no key before ``S - T + t - window + 1``.
        document_RT: `(R, T)` int, with ``document_RS`` `(R, S)`: a query sees keys of its own
            document; 0 is padding.
        document_RS: of the keys.
        prefix_RT: `(R, T)` int, with ``prefix_RS`` `(R, S)`: places that share a non-zero number
            see each other even where ``causal`` would not let them.
        prefix_RS: of the keys.
        bias_RHTS: broadcasts to `(R, H, T, S)`, added to the logits.
        gain_RHTS: broadcasts to `(R, H, T, S)`, multiplied after the softmax (URPE).
        fade_RTH: `(R, T, H)`, with ``fade_RSH`` `(R, S, H)`: minus their distance is added to the
            logits (ALiBi, forget gates).
        fade_RSH: of the keys.
        relative_NH: `(N, H)`, N odd: entry ``N // 2 + place_RT - place_RS``, clamped to the ends,
            is added to the logits.
        place_RT: `(R, T)` int, for ``relative_NH``.
        place_RS: `(R, S)` int.
        scale: of the logits; default ``K ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before anything is added.
        sink_H: `(H,)` logit of a key that every query sees and whose value is zero.
        want: statistics to return besides, without gradient: "key_mass" `(R, H, S)`, what each key
            receives from all queries; "entropy" `(R, H, T)` of each query's weights, in nats.
    Returns:
        `(R, T, H, V)` in the dtype of the values; with ``want`` a tuple of it and the statistics
        asked for, in that order.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245); soft-cap: Gemma 2 (arXiv:2408.00118), section 2; sink: gpt-oss
    (arXiv:2508.10925), section 2; fade: Press et al. 2021 (arXiv:2108.12409), section 3, and Lin
    et al. 2025 (arXiv:2503.02130); relative: Raffel et al. 2019 (arXiv:1910.10683), section 2.1.
    """
    R, T, H, K = q_RTHK.shape
    S, G = k_RSGK.shape[1], k_RSGK.shape[2]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    with torch.autocast(q_RTHK.device.type, enabled=False):
        q = q_RTHK.to(wide).reshape(R, T, G, H // G, K)
        logits = torch.einsum("rtghk,rsgk->rghts", q, k_RSGK.to(wide)) * (scale or 1 / math.sqrt(K))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        bias = _added(bias_RHTS, (fade_RTH, fade_RSH), relative_NH, (place_RT, place_RS))
        if bias is not None:
            logits = logits + bias.to(wide).expand(R, H, T, S).reshape(logits.shape)
        documents, prefixes = (document_RT, document_RS), (prefix_RT, prefix_RS)
        seen = _allowed(allowed_RTS, causal, T, S, q.device, window, documents, prefixes)
        hidden = ~seen[:, None, None] if seen is not None else None
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        if sink_H is not None:
            column = sink_H.to(wide).view(G, H // G, 1, 1).expand(*logits.shape[:-1], 1)
            full = torch.cat((logits, column), -1).softmax(-1)
            p = full[..., :-1]
        else:
            full = p = logits.softmax(-1)
        if hidden is not None:
            # Filled twice: a query without keys has a NaN softmax, which must become zeros, not
            # NaN.
            p = p.masked_fill(hidden, 0)
        stats = {}
        if "key_mass" in want:
            stats["key_mass"] = p.detach().sum(-2).flatten(1, 2)
        if "entropy" in want:
            stats["entropy"] = torch.special.entr(full.detach().nan_to_num()).sum(-1).flatten(1, 2)
        if gain_RHTS is not None:
            p = p * gain_RHTS.to(wide).expand(R, H, T, S).reshape(p.shape)
        y = torch.einsum("rghts,rsgv->rtghv", p, v_RSGV.to(wide))
        y = y.reshape(R, T, H, v_RSGV.shape[-1]).to(v_RSGV.dtype)
        return (y, *(stats[name] for name in want)) if want else y


_KEYWORDS = frozenset(attention.implementations["reference"][0].__kwdefaults__ or ())


def _unknown(how: dict[str, Any]) -> str | None:
    """The reference raises on a keyword that does not exist; what takes ``**how`` would not."""
    return next((f"it has no {name}" for name in how if name not in _KEYWORDS), None)


def _blocks_why_not(
    q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any
) -> str | None:
    if how.get("gain_RHTS") is not None:
        return "it has no gain after the softmax"
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return "nothing to attend to"
    return _unknown(how)


def _setting(q: Tensor, allowed: Tensor | None, how: dict[str, Any], way: str) -> tuple[Any, ...]:
    """The keywords of `attention` as `blocks.Setting` has them."""
    return (
        allowed,
        how.get("bias_RHTS"),
        how.get("fade_RTH"),
        how.get("fade_RSH"),
        how.get("relative_NH"),
        how.get("place_RT"),
        how.get("place_RS"),
        how.get("document_RT"),
        how.get("document_RS"),
        how.get("prefix_RT"),
        how.get("prefix_RS"),
        how.get("sink_H"),
        how.get("causal", False),
        how.get("window") or 0,
        how.get("scale") or 1 / math.sqrt(q.shape[-1]),
        how.get("softcap") or 0.0,
        way,
    )


def _by(
    way: str, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, how: dict[str, Any]
) -> Any:
    setting = _setting(q, allowed, how, way)
    y, lse = ops.run(q, k, v, *setting)
    if not how.get("want"):
        return y
    mass, entropy = ops.measured(q, k, v, lse, *setting)
    made = {"key_mass": mass, "entropy": entropy}
    return (y, *(made[name] for name in how["want"]))


@attention.register("blocks", _blocks_why_not)
def _blocks(q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any) -> Any:
    return _by("blocks", q, k, v, allowed_RTS, how)


def _flash_why_not(
    lacks: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, how: Any
) -> str | None:
    """What neither kernel of whole tiles can do, and what one of them ``lacks``."""
    for name in ("bias_RHTS", "gain_RHTS", "relative_NH", *lacks):
        if how.get(name) is not None:
            return f"it has no {name}"
    if allowed is not None:
        return "it has no allowed_RTS"
    if q.shape[-1] > 256 or v.shape[-1] > 256:
        return "heads wider than 256"
    return _blocks_why_not(q, k, v, **how)


def _triton_why_not(
    q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any
) -> str | None:
    if reason := _flash_why_not(("prefix_RT",), q, k, v, allowed_RTS, how):
        return reason
    if max(x.shape[1:].numel() for x in (q, k, v)) >= 1 << 31:
        return "a row of 2^31 numbers or more"
    return device.why_not(q, k, v)


@attention.register("triton", _triton_why_not)
def _triton(q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any) -> Any:
    return _by("flash_triton", q, k, v, allowed_RTS, how)


SMALL = 1 << 16  # places of a mask up to which a dense one costs nothing that can be seen


def _sdpa_why_not(
    q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any
) -> str | None:
    if how.get("gain_RHTS") is not None:
        return "it has no gain after the softmax"
    if how.get("softcap") is not None:
        return "it has no soft-cap"
    if how.get("want"):
        return "it keeps no statistics"
    if any(how.get(name) is not None for name in ("bias_RHTS", "fade_RTH", "relative_NH")):
        return "it rounds the bias to the dtype of the queries"
    if how.get("sink_H") is not None and q.device.type != "cpu":
        return "it rounds the sink to the dtype of the queries"
    T, S, causal, sink = q.shape[1], k.shape[1], how.get("causal", False), how.get("sink_H")
    masked = allowed_RTS is not None or any(
        how.get(name) is not None for name in ("window", "document_RT", "prefix_RT")
    )
    if causal and not masked and sink is None and T != S:
        return "its causal mask is aligned to the first key, not the last"
    if T == 0 or q.shape[0] == 0:
        return "no queries"
    if (masked or sink is not None) and T * S > SMALL:
        other = _blocks_why_not if q.device.type == "cpu" else _triton_why_not
        if other(q, k, v, allowed_RTS, **how) is None:
            return "it would make a mask of all scores"
    return _unknown(how)


@attention.register("sdpa", _sdpa_why_not)
def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any) -> Tensor:
    causal, scale, sink_H = how.get("causal", False), how.get("scale"), how.get("sink_H")
    allowed = allowed_RTS
    window, names = how.get("window"), ("document_RT", "document_RS", "prefix_RT", "prefix_RS")
    sides = [how.get(name) for name in names]
    if allowed is not None or window or sides[0] is not None or sides[2] is not None:
        documents, prefixes = (sides[0], sides[1]), (sides[2], sides[3])
        allowed = _allowed(
            allowed, causal, q.shape[1], k.shape[1], q.device, window, documents, prefixes
        )
        causal = False
    dtype = v.dtype
    if q.device.type == "cpu":
        # bf16 SDPA on a CPU is 4 times slower than fp32 at a few hundred tokens, and rounds the
        # probabilities.
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if sink_H is not None:
        seen = _allowed(allowed, causal, q.shape[1], k.shape[1], q.device)
        return _sunk(q, k, v, seen, sink_H, scale or 1 / math.sqrt(q.shape[-1])).to(dtype)
    seen = allowed
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=causal and seen is None,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        ).transpose(1, 2)
    if seen is not None:  # a query without keys: backends differ (NaN or zeros)
        y = y.masked_fill(~seen.any(-1)[:, :, None, None], 0)
    return y.to(dtype)


def _sunk(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, sink_H: Tensor, scale: float
) -> Tensor:
    """A sink as one more key of value zero: one more column makes its logit, and nobody else's."""
    T, S, K, V = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    width = max(K + 1, V)  # equal widths: unequal ones have no fused kernel on a CPU
    column = (sink_H.to(q.dtype) / scale)[:, None].expand(*q.shape[:-1], 1)
    q = F.pad(torch.cat((q, column), -1), (0, width - K - 1))
    key = F.one_hot(torch.tensor(K, device=k.device), width).to(k.dtype)
    k = torch.cat((key.expand(k.shape[0], 1, k.shape[2], width), F.pad(k, (0, width - K))), 1)
    v = F.pad(v, (0, width - V, 0, 0, 1, 0))
    if seen is None:
        seen = torch.ones(1, T, S, dtype=torch.bool, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=F.pad(seen, (1, 0), value=True)[:, None],
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return y.transpose(1, 2)[..., :V]


# Queries below which SDPA is as fast; half as many where it would need a mask, 8 times as many in
# float32 where nothing is hidden (benchmarks/attention_cpu.py).
FEW = 128


def _cpp_why_not(
    q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any
) -> str | None:
    if reason := _flash_why_not((), q, k, v, allowed_RTS, how):
        return reason
    if any(x.dtype not in (torch.float32, torch.bfloat16) for x in (q, k, v)):
        return f"no kernel for {q.dtype}"
    masked = any(how.get(name) is not None for name in ("window", "document_RT", "prefix_RT"))
    few = FEW // 2 if masked else FEW
    if q.dtype == torch.float32 and not masked and not how.get("causal"):
        few = 8 * FEW
    if q.shape[1] < few and _sdpa_why_not(q, k, v, **how) is None:
        return "SDPA is faster on so few queries"
    return compiler.why_not(flash_cpp.SOURCE, q, k, v)


@attention.register("cpp", _cpp_why_not)
def _cpp(q: Tensor, k: Tensor, v: Tensor, allowed_RTS: Tensor | None = None, **how: Any) -> Any:
    return _by("flash_cpp", q, k, v, allowed_RTS, how)
