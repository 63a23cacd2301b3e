"""DeltaNet's mixer: its settings, what it can compute, documents and drafts beyond a chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import TOL, D, alone, apply, documents, packed, unpacked
from torch import Tensor

from mm.kernels.delta_rule import delta_rule
from mm.layout import Layout
from mm.model.backbones.stack import StackConfig
from mm.model.layer import init_weights
from mm.model.length_buckets import LengthBuckets
from mm.model.mixers.conv.state import ShortConv
from mm.model.mixers.linear_attention.delta_rule import DeltaRule, DeltaRuleConfig

SETTINGS = {
    "plain": {},
    "no convolution": {"conv_size": 1},
    "gated": {"gate": "scalar", "output_gate": True},
    "reflecting": {"negative_eigenvalues": True, "value_dim": 3},
    "shared keys": {"heads": 4, "key_heads": 2, "key_dim": 5, "norm_eps": 1e-3, "gate": "scalar"},
}


def build(dtype: torch.dtype = torch.float64, **settings: object) -> DeltaRule:
    torch.manual_seed(1)
    layer = DeltaRuleConfig(**{"heads": 2, **settings}).build(D)  # type: ignore[arg-type]
    init_weights(layer)
    return layer.to(dtype)


def by_hand(layer: DeltaRule, x_TD: Tensor) -> Tensor:
    """The paper's equations, head by head and token by token."""
    H, G, K, V = layer.heads, layer.key_heads, layer.key_dim, layer.value_dim
    u = layer.qkv(x_TD)
    if isinstance(layer.conv, ShortConv):
        past = torch.cat((u.new_zeros(layer.conv.size, u.shape[1]), u))
        u = sum(w * past[j : j + len(u)] for j, w in enumerate(layer.conv.weight))
    u = F.silu(u)
    rates = layer.rates(x_TD)
    out = []
    for h in range(H):
        g = h * G // H
        q = F.normalize(u[:, g * K : (g + 1) * K], dim=-1) * K**-0.5
        k = F.normalize(u[:, (G + g) * K : (G + g + 1) * K], dim=-1)
        v = u[:, 2 * G * K + h * V : 2 * G * K + (h + 1) * V]
        beta = layer.top * rates[:, h].sigmoid()
        alpha = torch.ones_like(beta)
        if layer.log_decay is not None and layer.rate_bias is not None:
            step = F.softplus(rates[:, H + h] + layer.rate_bias[h])
            alpha = (-layer.log_decay[h].exp() * step).exp()
        S, reads = torch.zeros(K, V, dtype=x_TD.dtype), []
        for t in range(len(x_TD)):
            erase = torch.eye(K, dtype=x_TD.dtype) - beta[t] * torch.outer(k[t], k[t])
            S = erase @ (alpha[t] * S) + beta[t] * torch.outer(k[t], v[t])
            reads.append(q[t] @ S)
        o = torch.stack(reads)
        eps = layer.norm.eps
        out.append(o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * layer.norm.weight)
    y = torch.cat(out, -1)
    if layer.gate is not None:
        y = y * F.silu(layer.gate(x_TD))
    return layer.out(y)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_papers_layer(settings: dict[str, object]) -> None:
    layer, (doc,) = build(**settings), documents(20)
    with torch.no_grad():
        # The added 1e-6 under the square root of the norms is all that differs.
        torch.testing.assert_close(alone(layer, doc), by_hand(layer, doc), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ragged_documents_beyond_a_chunk(settings: dict[str, object]) -> None:
    """Packed equals separate in outputs and gradients, with one token, 64 and 65 of them."""
    layer = build(**settings)
    lengths = (1, 64, 65, 3, 130, 63)

    def run(together: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        docs = [d.requires_grad_() for d in documents(*lengths)]
        if together:
            rows = [[(-1, d, 0) for d in docs[:4]], [(-1, d, 0) for d in docs[4:]]]
            x, layout = packed(rows, pad=3)
            ys = [y for _, y in unpacked(apply(layer, x, layout).y, rows)]
        else:
            ys = [alone(layer, d) for d in docs]
        loss = sum((y * w).sum() for y, w in zip(ys, documents(*lengths, seed=2), strict=True))
        return ys, torch.autograd.grad(loss, [*docs, *layer.parameters()])

    for got, expected in zip(run(True), run(False), strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **TOL)


def _ctx(layout: Layout):  # noqa: ANN202
    from mm.mask import Causal
    from mm.model.context import Ctx

    return Ctx(layout, Causal())


def test_layers_share_the_grouping_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    of = LengthBuckets.of
    monkeypatch.setattr(LengthBuckets, "of", staticmethod(lambda *a: (calls.append(1), of(*a))[1]))
    stack = StackConfig(depth=3, pattern="deltanet gated_deltanet").build(D)
    init_weights(stack)
    x, layout = packed([[(-1, d, 0) for d in documents(5, 30)]])
    apply(stack.double(), x, layout)
    assert len(calls) == 1


def test_packed_documents_compile() -> None:
    torch._dynamo.reset()
    layer = build(gate="scalar")
    x, layout = packed([[(-1, d, 0) for d in documents(5, 1, 9)]], pad=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x, _ctx(layout)).y
    torch.testing.assert_close(y[:, :15], apply(layer, x, layout).y[:, :15], **TOL)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_draft_of_many_tokens_is_accepted_in_part(settings: dict[str, object]) -> None:
    """Wrong guesses may even be inf."""
    layer, (doc,) = build(**settings), documents(90)
    with torch.no_grad():
        x, layout = packed([[(0, doc[:7], 0)]])
        state = apply(layer, x, layout, layer.initial_state(1, 90)).state
        guess = doc[7:80].clone()
        guess[40:] = float("inf")
        x, layout = packed([[(0, guess, 7)]])
        drafted = apply(layer, x, layout, state, draft=True)
        assert drafted.state is not None
        state = drafted.state.accept(torch.tensor([40]))
        x, layout = packed([[(0, doc[47:], 47)]])
        y = torch.cat((drafted.y[0, :40], apply(layer, x, layout, state).y[0]))
        torch.testing.assert_close(y, alone(layer, doc)[7:], **TOL)


@pytest.mark.parametrize("negative", [True, False])
def test_negative_eigenvalues_track_parity(negative: bool) -> None:
    """A write at the start, then a reflection for every 1.

    The sign of the output is the parity of 500 bits. Without negative eigenvalues the same weights
    forget it.
    """
    layer = build(heads=1, key_dim=2, value_dim=2, conv_size=1, negative_eigenvalues=negative)
    bits = torch.randint(2, (500,), generator=torch.Generator().manual_seed(0))
    kind = torch.cat((torch.tensor([2]), bits))  # 2 = start
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.norm.weight.fill_(1)
        layer.qkv.weight[[0, 2], :3] = 5.0  # every token has the same query and key
        layer.qkv.weight[4, 2] = 5.0  # only the start has a value
        layer.rates.weight[0, :3] = torch.tensor([-60.0, 60.0, 0.0])
        layer.out.weight[0, 0] = 1.0
        y = alone(layer, F.one_hot(kind, D).double())[:, 0]
    parity = 1.0 - 2 * (torch.cat((torch.zeros(1), bits)).cumsum(0) % 2)
    assert torch.equal(y.sign(), parity.double()) is negative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_follow_float64(dtype: torch.dtype) -> None:
    wide, narrow, (doc,) = build(gate="scalar"), build(dtype, gate="scalar"), documents(100)
    with torch.no_grad():
        expected, got = alone(wide, doc), alone(narrow, doc.to(dtype))
    assert got.dtype == dtype
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


def test_gradients_reach_every_parameter_on_every_implementation() -> None:
    layer, (doc,) = build(**SETTINGS["gated"]), documents(70)
    grads = []
    for name in (n for n in delta_rule.implementations if n != "triton"):
        with delta_rule.using(name):
            grads.append(
                torch.autograd.grad(alone(layer, doc).square().sum(), [*layer.parameters()])
            )
    for a, b in zip(*grads, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, **TOL)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="set key_dim"):
        DeltaRuleConfig(heads=3).build(D)
