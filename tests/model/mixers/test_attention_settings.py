"""Settings of attention against their formulas written out.

The laws run their presets (test_contract.py), decoding from a cache included.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check, dtypes, randn
from laws import TOL, D, alone, apply, documents, packed
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.mask import Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.attention.attention import Attention
from mm.model.mixers.attention.forget_gate import forget_bias
from mm.registry import MIXERS


def build(**settings: Any) -> Attention:
    torch.manual_seed(5)
    layer = MIXERS.get("attention")(
        **{"heads": 2, "position": "none", "qk_norm": False, **settings}
    ).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.double()


def projected(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(H, T, K)`, keys and values repeated to all heads, of one document `(T, D)`."""
    H, G, K = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v = (x @ layer.qkv.weight.T).view(-1, H + 2 * G, K).transpose(0, 1).split((H, G, G))
    return q, k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)


def finished(layer: Attention, logits: Tensor, v: Tensor) -> Tensor:
    T = logits.shape[-1]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return y.transpose(0, 1).flatten(1) @ layer.out.weight.T


# ---- the kernel ----


@dtypes
@pytest.mark.parametrize(
    "R,T,S,H,G", [(1, 1, 1, 1, 1), (2, 3, 3, 4, 2), (1, 65, 65, 2, 1), (2, 5, 9, 4, 4)]
)
@pytest.mark.parametrize("mask", ["none", "causal", "some", "nothing for a query"])
def test_sinks_of_sdpa(
    dtype: torch.dtype, R: int, T: int, S: int, H: int, G: int, mask: str
) -> None:
    allowed = None
    if mask in ("some", "nothing for a query"):
        allowed = torch.rand(R, T, S, generator=torch.Generator().manual_seed(2)) < 0.6
        allowed[:, 0] = False
    for V in (3, 6, 10):  # narrower and wider than the keys
        q, k, v = (
            randn(R, n, h, w, dtype=dtype, seed=i)
            for i, (n, h, w) in enumerate(((T, H, 6), (S, G, 6), (S, G, V)))
        )
        sink = randn(H, dtype=dtype, seed=7)
        bound = lambda q, k, v, sink: attention(
            q, k, v, MaskSpec(allowed, mask == "causal"), ScoreSpec(sink_H=sink, scale=0.3)
        )
        outs = {}
        for name, wide in (("sdpa", dtype), ("reference", torch.float64)):
            leaves = [t.detach().to(wide).requires_grad_() for t in (q, k, v, sink)]
            with attention.using(name):
                y = bound(*leaves)
            weight = randn(*y.shape, seed=9).detach()
            grads = torch.autograd.grad((y.double() * weight).sum(), leaves)
            outs[name] = [t.double() for t in (y, *grads)]
        tolerance = {torch.float64: 1e-10, torch.float32: 3e-5}[dtype]
        for got, expected in zip(*outs.values(), strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_sink_is_softmax_with_one_more_logit() -> None:
    q, k, v, sink = (
        randn(1, 3, 2, 4),
        randn(1, 3, 1, 4, seed=1),
        randn(1, 3, 1, 5, seed=2),
        randn(2),
    )
    logits = torch.einsum("rthk,rsk->rhts", q, k[:, :, 0]) / 2
    weights = logits.exp() / (logits.exp().sum(-1, keepdim=True) + sink.exp()[:, None, None])
    expected = torch.einsum("rhts,rsv->rthv", weights, v[:, :, 0])
    torch.testing.assert_close(attention(q, k, v, score=ScoreSpec(sink_H=sink)), expected)
    torch.testing.assert_close(  # a sink of -inf is none
        attention(q, k, v, score=ScoreSpec(sink_H=torch.full((2,), -1e9).double())),
        attention(q, k, v),
    )


def test_softcap_bounds_the_logits_and_a_wide_one_does_nothing() -> None:
    q, k, v = randn(1, 4, 2, 4), randn(1, 4, 2, 4, seed=1), randn(1, 4, 2, 5, seed=2)
    logits = torch.einsum("rthk,rshk->rhts", q, k) / 2
    expected = torch.einsum("rhts,rshv->rthv", (3 * (logits / 3).tanh()).softmax(-1), v)
    bound = lambda cap: attention(q, k, v, score=ScoreSpec(softcap=cap))
    torch.testing.assert_close(bound(3.0), expected)
    torch.testing.assert_close(bound(1e6), attention(q, k, v))
    specs = {"mask": MaskSpec(causal=True), "score": ScoreSpec(softcap=2.0)}
    check(attention, "reference", (q, k, v), torch.float64, **specs)
    with attention.using("reference"):
        assert torch.autograd.gradcheck(lambda *a: attention(*a, score=specs["score"]), (q, k, v))


# ---- the layer ----


def test_softcap_of_the_layer() -> None:
    layer, (x,) = build(softcap=1.5), documents(9)
    q, k, v = projected(layer, x)
    logits = q @ k.transpose(1, 2) * layer.head_dim**-0.5
    expected = finished(layer, 1.5 * (logits / 1.5).tanh(), v)
    torch.testing.assert_close(alone(layer, x), expected, **TOL)


def test_log_n_of_the_layer() -> None:
    layer, (x,) = build(log_n=math.e), documents(9)
    q, k, v = projected(layer, x)
    n = torch.arange(1, 10).double()[:, None]
    logits = n.log() * (q @ k.transpose(1, 2)) * layer.head_dim**-0.5
    torch.testing.assert_close(alone(layer, x), finished(layer, logits, v), **TOL)
    windowed = build(log_n=math.e, window=4)
    windowed.load_state_dict(layer.state_dict())
    logits = n.clamp_max(4).log() * (q @ k.transpose(1, 2)) * layer.head_dim**-0.5
    logits = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).tril(-4), -math.inf)
    torch.testing.assert_close(alone(windowed, x), finished(layer, logits, v), **TOL)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_forget_gate_is_the_papers_product_of_gates(kv_heads: int) -> None:
    layer, (x,) = build(forget_gate=True, kv_heads=kv_heads), documents(9)
    q, k, v = projected(layer, x)
    gate = layer.forget
    assert gate is not None
    f = torch.sigmoid(x @ gate.gate.weight.T + gate.bias)  # (T, H)
    bias = x.new_zeros(2, 9, 9)
    for i in range(9):
        for j in range(i):
            bias[:, i, j] = f[j + 1 : i + 1].prod(0).log()
    logits = q @ k.transpose(1, 2) * layer.head_dim**-0.5 + bias
    torch.testing.assert_close(alone(layer, x), finished(layer, logits, v), **TOL)


def test_open_gates_are_attention_without_positions_and_constant_ones_are_alibi() -> None:
    layer, (x,) = build(forget_gate=True), documents(12)
    assert layer.forget is not None
    weights = {n: p for n, p in layer.state_dict().items() if not n.startswith("forget")}
    with torch.no_grad():
        layer.forget.gate.weight.zero_()
        layer.forget.bias.fill_(60.0)
    plain = build()
    plain.load_state_dict(weights)
    torch.testing.assert_close(alone(layer, x), alone(plain, x), **TOL)
    alibi = build(position="alibi")
    alibi.load_state_dict(weights)
    with torch.no_grad():  # -log f = slope: 1/16 and 1/256
        f = torch.tensor([-1 / 16, -1 / 256], dtype=torch.float64).exp()
        layer.forget.bias.copy_(f.logit())
    torch.testing.assert_close(alone(layer, x), alone(alibi, x), **TOL)


def test_forget_bias_sums_what_lies_between_both_ways() -> None:
    kept = F.logsigmoid(randn(1, 6, 1)).detach()
    faded = kept.cumsum(1)
    bias = forget_bias(faded, faded)[0, 0]
    torch.testing.assert_close(bias[4, 1], kept[0, 2:5, 0].sum())
    torch.testing.assert_close(bias, bias.T)
    assert (bias <= 0).all() and (bias.diagonal() == 0).all()
    layer, (x,) = build(forget_gate=True), documents(5)
    x, layout = packed([[(-1, x, 0)]])
    assert layer(x, Ctx(layout, Full())).y.isfinite().all()


PRO: dict[str, Any] = {
    "forget_gate": True, "qk_norm": "heads", "out_norm": True, "gate": True, "token_shift": True
}  # fmt: skip


def test_the_pro_block_is_its_equations_token_by_token() -> None:
    """``k_t = norm(a_t k'_{t-1} + (1 - a_t) k'_t)``, values alike without a norm.

    Then ``y = out(norm(o) sigmoid(g))``, each norm by head.
    """
    layer, (x,) = build(**PRO), documents(7)
    assert layer.shift is not None and layer.gate is not None and layer.forget is not None
    assert layer.q_norm is not None and layer.k_norm is not None and layer.out_norm is not None
    H, K, T = layer.heads, layer.head_dim, len(x)
    norm = lambda z, w: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    q, k, v = (x @ layer.qkv.weight.T).view(T, 3 * H, K).split(H, dim=1)
    share = (x @ layer.shift.gates.weight.T).sigmoid()
    f = torch.sigmoid(x @ layer.forget.gate.weight.T + layer.forget.bias)
    outs = []
    for t in range(T):
        heads = []
        for h in range(H):
            keys, values = [], []
            for s in range(t + 1):
                a, b = share[s, h], share[s, H + h]
                before = (k[s - 1, h], v[s - 1, h]) if s else (0 * k[0, h], 0 * v[0, h])
                key = norm(a * before[0] + (1 - a) * k[s, h], layer.k_norm.weight[h])
                keys.append(key)
                values.append(b * before[1] + (1 - b) * v[s, h])
            query = norm(q[t, h], layer.q_norm.weight[h])
            fade = torch.stack([f[s + 1 : t + 1, h].prod().log() for s in range(t + 1)])
            p = (torch.stack(keys) @ query * K**-0.5 + fade).softmax(0)
            heads.append(norm(p @ torch.stack(values), layer.out_norm.weight[h]))
        outs.append(torch.cat(heads) * (layer.gate.weight @ x[t]).sigmoid())
    torch.testing.assert_close(alone(layer, x), torch.stack(outs) @ layer.out.weight.T, **TOL)


@pytest.mark.parametrize(
    "settings",
    [
        {"forget_gate": True, "window": 3, "kv_heads": 1},
        {"forget_gate": True, "position": "t5_bias", "sinks": True, "softcap": 2.0, "log_n": 4.0},
        {"position": "rope", "sinks": True, "window": 2},
        {**PRO, "kv_heads": 1, "window": 3},
    ],
    ids=["fox in a ring", "all at once", "sinks in a ring", "fox pro in a ring"],
)
@pytest.mark.parametrize("draft", [False, True])
def test_settings_together_decode_as_they_read(settings: dict[str, Any], draft: bool) -> None:
    layer, docs = build(**settings), documents(11, 8)
    with torch.no_grad():
        state, got = layer.initial_state(2, 11), [[], []]
        assert state.n_bytes() == layer.state_bytes(2, 11)
        for at, stop in ((0, 4), (4, 5), (5, 6), (6, 8)):
            rows = [[(s, docs[s][at:stop], at)] for s in range(2)]
            x, layout = packed(rows)
            if draft:  # one guess too many, refused
                wrong = [
                    [(s, torch.cat((docs[s][at:stop], x.new_full((1, D), 7.0))), at)]
                    for s in range(2)
                ]
                x, layout = packed(wrong)
            out = apply(layer, x, layout, state, draft=draft)
            state = out.state.accept(torch.full((2,), stop - at)) if draft else out.state
            for s in range(2):
                got[s].append(out.y[s, : stop - at])
    for s in range(2):
        torch.testing.assert_close(torch.cat(got[s]), alone(layer, docs[s])[:8], **TOL)


def test_scored_attention_of_packed_documents_leaks_no_inf() -> None:
    """A masked place may hold inf: no row may hold two documents."""
    for settings in ({"position": "alibi"}, {"position": "t5_bias"}, {"forget_gate": True}):
        layer, docs = build(**settings), documents(4, 5)
        bad = docs[0].clone()
        bad[1] = math.inf
        x, layout = packed([[(-1, bad, 0), (-1, docs[1], 0)]])
        torch.testing.assert_close(apply(layer, x, layout).y[0, 4:9], alone(layer, docs[1]), **TOL)


@pytest.mark.parametrize(
    ("kind", "settings", "runs"),
    [
        ("attention", {}, 0),
        ("attention", {"forget_gate": True}, 0),
        ("attention", {"token_shift": True}, 1),
        ("kv_shift", {}, 1),
        ("topk_attention", {}, 0),
    ],
)
def test_a_cache_is_cut_and_only_other_states_make_a_draft_run_again(
    kind: str, settings: dict[str, Any], runs: int
) -> None:
    layer = MIXERS.get(kind)(heads=2, **settings).build(D)
    init_weights(layer)
    layer.double()
    x, layout = packed([[(slot, *documents(5, seed=slot), 0)] for slot in range(2)])
    state = apply(layer, x, layout, layer.initial_state(2, 9), draft=True).state
    ran: list[int] = []
    layer.qkv.register_forward_hook(lambda *_: ran.append(1))
    state.accept(torch.tensor([2, 4]))
    assert len(ran) == runs
