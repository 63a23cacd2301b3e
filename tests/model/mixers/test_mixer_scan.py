"""Recurrent mixers equal the equations of their papers.

B rows, T tokens, D model, W width, N states.
"""

from __future__ import annotations

import math

import pytest
import torch
from laws import D, alone, apply, documents, packed, unpacked
from torch import Tensor, nn

from mm.kernels.complex_scan import complex_scan
from mm.kernels.diagonal_ssm import diagonal_ssm
from mm.kernels.linear_scan import linear_scan
from mm.layout import Layout
from mm.model.backbones.stack import StackConfig
from mm.model.layer import Layer, init_weights
from mm.model.mixers.rnn.gru import GRU
from mm.model.mixers.rnn.lstm import LSTM
from mm.model.mixers.ssm.gated_scan import GatedScan, GatedScanConfig, positive
from mm.model.mixers.ssm.lru import LRU, LRUConfig
from mm.model.mixers.ssm.s4d import S4D, S4DConfig, eigenvalues
from mm.registry import MIXERS

LENGTHS = (1, 3, 63, 64, 65, 130)


def made(word: str, **settings: object) -> Layer:
    """A preset or kind, initialised, float64, with every parameter away from its special value."""
    torch.manual_seed(3)
    config = StackConfig(pattern=word).mixer(word)
    layer = type(config).model_validate({**config.model_dump(), **settings}).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.double()


def steps(a: Tensor, b: Tensor) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` of `(T, W)`, real or complex."""
    h, out = torch.zeros_like(b[0]), []
    for x, y in zip(a, b, strict=True):
        h = x * h + y
        out.append(h)
    return torch.stack(out)


def same(layer: Layer, naive, T: int) -> None:
    """Outputs and the gradients of the input and of all parameters."""
    (x,) = documents(T)
    weight = torch.randn(T, D, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    got, expected = alone(layer, x), naive(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def parts(layer: GatedScan, x: Tensor) -> list[Tensor]:
    """Pre-activations of the token: gates (with bias) first, then what the layer says."""
    p = list(layer.inner(x).split(layer.width, -1))
    for k, bias in enumerate(layer.gate_bias.chunk(layer.gates)):
        p[k] = p[k] + bias
    return p


@pytest.mark.parametrize("word", ["min_gru", "min_gru_log_space"])
@pytest.mark.parametrize("T", LENGTHS)
def test_min_gru(T: int, word: str) -> None:
    layer = made(word)
    assert isinstance(layer, GatedScan)

    def naive(x: Tensor) -> Tensor:
        z, c = parts(layer, x)
        z, g = z.sigmoid(), torch.where(c >= 0, c + 0.5, c.sigmoid())
        return layer.out(steps(1 - z, z * g))

    same(layer, naive, T)


def test_log_space_needs_positive_numbers() -> None:
    with pytest.raises(ValueError, match="log_space needs positive numbers"):
        GatedScanConfig(log_space=True, candidate="tanh")


def test_min_gru_has_two_matrices_before_the_output() -> None:
    layer = made("min_gru")
    assert layer.inner.weight.numel() == 2 * D * D
    assert positive(torch.linspace(-5, 5, 100)).gt(0).all()


@pytest.mark.parametrize("log_space", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_min_lstm(T: int, log_space: bool) -> None:
    layer = made("min_lstm", log_space=log_space)
    assert isinstance(layer, GatedScan)

    def naive(x: Tensor) -> Tensor:
        f, i, c = parts(layer, x)
        f, i = f.sigmoid(), i.sigmoid()
        return layer.out(steps(f / (f + i), i / (f + i) * positive(c)))

    same(layer, naive, T)


@pytest.mark.parametrize("T", LENGTHS)
def test_hgrn(T: int) -> None:
    layer = made("hgrn", lower_bound=0.5)
    assert isinstance(layer, GatedScan)

    def naive(x: Tensor) -> Tensor:
        mu, cr, ci, gr, gi = parts(layer, x)
        low = layer.bound.sigmoid()
        decay = low + (1 - low) * mu.sigmoid()
        c = torch.complex(nn.functional.silu(cr), nn.functional.silu(ci))
        h = steps(decay * torch.exp(1j * layer.theta), (1 - decay) * c)
        y = torch.cat((h.real, h.imag), -1) * torch.cat((gr, gi), -1).sigmoid()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * layer.norm.weight
        return layer.out(y)

    same(layer, naive, T)


@pytest.mark.parametrize("T", LENGTHS)
def test_gateloop_recurrence_equals_its_surrogate_attention(T: int) -> None:
    """``y_n = Re(q_n sum_m (prod_{m < j <= n} a_j) k_m v_m)``."""
    layer = made("gateloop")
    assert isinstance(layer, GatedScan)

    def naive(x: Tensor) -> Tensor:
        alpha, v, beta, k, q, g = parts(layer, x)
        # Sums of logarithms, masked before exp: nothing overflows.
        log = torch.complex(nn.functional.logsigmoid(alpha), beta).cumsum(0)
        causal = torch.ones(T, T, dtype=torch.bool).tril()[..., None]
        product = torch.where(causal, log[:, None] - log[None], 0).exp() * causal
        y = (q[:, None] * product * (k * v)[None]).sum(1).real
        return layer.out(y * nn.functional.silu(g))

    same(layer, naive, T)


def test_lower_bound_holds_whatever_the_input() -> None:
    layer = made("hgrn", lower_bound=0.8)
    p = torch.linspace(-50, 50, 40, dtype=torch.float64)[None, :, None].expand(1, 40, D)
    a, _ = layer._gated(p, torch.zeros(1, 40, 2 * D, dtype=torch.float64))
    low = layer.bound.sigmoid()
    assert (a >= low - 1e-12).all() and (a <= 1).all() and (low > 0.6).all()


def test_gated_scan_refuses_settings_that_do_not_fit() -> None:
    config = MIXERS.get("gated_scan")
    for bad in (
        {"complex_values": True},
        {"complex_values": True, "phase": "fixed", "keyed": True},
        {"gate": "update", "lower_bound": 0.5},
    ):
        with pytest.raises(ValueError, match="gated_scan"):
            config.model_validate(bad)


@pytest.mark.parametrize("T", LENGTHS)
def test_lru(T: int) -> None:
    layer = made("lru")
    assert isinstance(layer, LRU)
    W = layer.width

    def naive(x: Tensor) -> Tensor:
        lam = torch.exp(torch.complex(-layer.nu.exp(), layer.theta.exp()))
        b = torch.complex(layer.inner.weight[:W], layer.inner.weight[W:])
        c = torch.complex(layer.out.weight[:, :W], -layer.out.weight[:, W:])
        u = layer.gamma.exp() * (x.to(b.dtype) @ b.T)
        return (steps(lam.expand(T, W), u) @ c.T).real + layer.skip * x

    same(layer, naive, T)


def test_lru_begins_on_its_ring_with_a_variance_that_no_memory_changes() -> None:
    torch.manual_seed(0)
    layer = LRUConfig(width=512, r_min=0.9, r_max=0.999).build(D)
    init_weights(layer)
    re, im = layer.eigenvalues().chunk(2)
    size = torch.hypot(re, im)
    assert (size >= 0.9 - 1e-6).all() and (size <= 0.999 + 1e-6).all()
    torch.testing.assert_close(layer.gamma.exp(), (1 - size**2).sqrt(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        u = layer.inner(torch.randn(1, 10_000, D)) * layer.gamma.exp().repeat(2)
        h, _ = complex_scan(layer.eigenvalues(), u)
    early, late = h[:, 10:60].square().sum(-1).mean(), h[:, -5000:].square().sum(-1).mean()
    assert 0.7 < late / 512 < 1.4, f"variance of a state after 10000 tokens: {late / 512:.2f}"
    assert early < 2 * late


def kernel_of(layer: S4D, T: int) -> Tensor:
    """The convolution kernel `(D, T)`, from complex numbers: ``K_l = 2 Re(C A^l B)``."""
    dt = layer.log_step.exp()[:, None]
    im = layer.frequency if layer.frequency is not None else torch.zeros_like(layer.log_rate)
    A = torch.complex(-layer.log_rate.exp(), im)
    c = layer.readout
    C = torch.complex(c[0], c[1] if len(c) == 2 else torch.zeros_like(c[0]))
    if layer.config.discretisation == "zoh":
        a = torch.exp(dt * A)
        b = (a - 1) / A
    else:
        a, b = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    powers = a[..., None] ** torch.arange(T)
    return 2 * torch.einsum("dn,dnt->dt", C * b, powers).real


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_s4d_recurrence_equals_its_convolution(init: str, discretisation: str, T: int) -> None:
    layer = made("s4d", init=init, discretisation=discretisation, states=4)
    assert isinstance(layer, S4D)

    def naive(x: Tensor) -> Tensor:
        K = kernel_of(layer, T)
        lag = torch.arange(T)[:, None] - torch.arange(T)[None]
        toeplitz = torch.where(lag >= 0, K[:, lag.clamp_min(0)], 0)
        y = torch.einsum("dts,sd->td", toeplitz, x) + layer.skip * x
        return layer.out(nn.functional.gelu(y))

    same(layer, naive, T)


def test_s4d_steps_equal_its_convolution() -> None:
    """One token a call, and drafted calls, as the kernel says."""
    layer = made("s4d", states=4)
    (x,) = documents(12)
    K = kernel_of(layer, 12)
    expected = torch.stack([(K[:, : t + 1].flip(1) * x[: t + 1].T).sum(1) for t in range(12)])
    expected = layer.out(nn.functional.gelu(expected + layer.skip * x))
    state, got = layer.initial_state(1, 12), []
    for t in range(0, 12, 2):
        rows, layout = packed([[(0, x[t : t + 2], t)]])
        out = apply(layer, rows, layout, state, draft=t % 4 == 0)
        state = out.state
        got.append(out.y[0])
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-9, atol=1e-10)


def test_s4d_halved_steps_are_a_resampled_input() -> None:
    """ZOH holds its input between samples: half the step on doubled samples gives the same."""
    layer = made("s4d", states=4)
    (x,) = documents(20)
    whole = alone(layer, x)
    with torch.no_grad():
        layer.log_step.sub_(math.log(2))
    doubled = alone(layer, x.repeat_interleave(2, 0))
    torch.testing.assert_close(doubled[1::2], whole, rtol=1e-9, atol=1e-10)


def test_s4d_legs_has_the_eigenvalues_of_hippo() -> None:
    """Of ``A + P P^T`` with HiPPO-LegS ``A``, size 2N."""
    n = torch.arange(16, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -(torch.outer(root, root).tril(-1) + torch.diag(n + 1))
    P = (n + 0.5).sqrt()
    found = torch.linalg.eigvals(A + torch.outer(P, P))
    rate, frequency = eigenvalues("legs", 8)
    torch.testing.assert_close(found.real, torch.full((16,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(found.imag[found.imag > 0].sort()[0], frequency.sort()[0])
    torch.testing.assert_close(rate, torch.full((8,), 0.5, dtype=torch.float64))


def test_s4d_inits_differ() -> None:
    found = {init: eigenvalues(init, 8) for init in ("lin", "inv", "legs", "real")}
    assert found["real"][1].eq(0).all() and found["lin"][1][1].item() == pytest.approx(torch.pi)
    # S4D-Inv approximates LegS in its largest frequencies, as the paper's figure shows.
    assert found["inv"][1].max() / found["legs"][1].max() == pytest.approx(1, abs=0.1)
    assert S4DConfig(init="real").build(D).frequency is None


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_rnn_equals_torch(kind: str) -> None:
    """Outputs and gradients of ragged documents in packed rows; the State is torch's last one."""
    layer = made(kind, width=6)
    assert isinstance(layer, GRU | LSTM)
    theirs = {"gru": nn.GRU, "lstm": nn.LSTM}[kind](D, 6, batch_first=True).double()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(getattr(layer, name.removesuffix("_l0")))
    docs = documents(*LENGTHS)
    rows = [[(i, docs[i], 0) for i in group] for group in ((5, 0, 1), (2, 3), (4,))]
    weights = documents(*LENGTHS, seed=1)
    own = [getattr(layer, n.removesuffix("_l0")) for n, _ in theirs.named_parameters()]
    for served in (False, True):
        x, layout = packed(rows, pad=2)
        out = apply(layer, x, layout, layer.initial_state(len(docs), 130) if served else None)
        got = dict(unpacked(out.y, rows))
        runs = [theirs(d[None]) for d in docs]
        for i, (y, _) in enumerate(runs):
            torch.testing.assert_close(got[i], layer.out(y[0]), rtol=1e-9, atol=1e-10)
        if out.state is not None:
            last = [torch.cat(s, -1) if isinstance(s, tuple) else s for _, s in runs]
            torch.testing.assert_close(out.state.h, torch.cat([s[0] for s in last]))
        mine = torch.autograd.grad(sum((got[i] * w).sum() for i, w in enumerate(weights)), own)
        loss = sum((layer.out(y[0]) * w).sum() for (y, _), w in zip(runs, weights, strict=True))
        for a, b in zip(mine, torch.autograd.grad(loss, list(theirs.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("word", ["min_gru", "min_lstm", "hgrn", "gateloop", "lru", "s4d"])
def test_the_fast_path_equals_the_reference(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole layer, on packed ragged documents, with the gradients of everything."""
    layer, docs = made(word), documents(65, 1, 30, 3)
    x, layout = packed([[(-1, d, 0) for d in docs[:2]], [(-1, d, 0) for d in docs[2:]]], pad=1)
    x.requires_grad_()
    weight = torch.randn_like(x)
    weight[layout.fields.document == 0] = 0

    def run(reference: bool) -> tuple[Tensor, ...]:
        for op in (complex_scan, diagonal_ssm, linear_scan):
            monkeypatch.setattr(op, "_forced", "reference" if reference else None)
        y = apply(layer, x, layout).y
        return y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_rnn_without_tokens() -> None:
    for kind in ("gru", "lstm"):
        layer = made(kind)
        empty = torch.zeros(2, 0, D, dtype=torch.float64)
        assert apply(layer, empty, Layout.plain(2, 0)).y.shape == (2, 0, D)
