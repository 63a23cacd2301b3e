"""HiPPO memories, S4, LSSL and LMU against their papers. B rows, T tokens, D model, N states."""

from __future__ import annotations

import math

import pytest
import torch
from laws import D, alone, documents
from numpy.polynomial import laguerre, legendre
from torch import Tensor

from mm.kernels.dense_ssm import dense_ssm
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.ssm import s4
from mm.model.mixers.ssm.hippo import HiPPOConfig, HiPPOMemory
from mm.model.mixers.ssm.hippo_matrices import Measure, discretise, hippo, nplr_legs
from mm.model.mixers.ssm.s4 import S4, S4Config
from mm.model.mixers.ssm.s5 import S5Config
from mm.registry import MIXERS


def signal(t: Tensor) -> Tensor:
    """Smooth and band-limited on [0, 1]."""
    return torch.sin(7 * t) + 0.5 * torch.cos(11 * t + 1)


def projection(f: Tensor, n: int, newest: float) -> Tensor:
    """Orthonormal Legendre coefficients on [0, 1] of midpoint samples; x runs to ``newest``."""
    places = (torch.arange(len(f), dtype=torch.float64) + 0.5) / len(f)
    x = (2 * places - 1) * newest
    basis = torch.from_numpy(legendre.legvander(x.numpy(), n - 1))
    return (basis * f[:, None]).mean(0) * (2 * torch.arange(n) + 1).sqrt()


def test_legs_holds_the_legendre_coefficients_of_all_of_the_past() -> None:
    """The stretched recurrence c' = -(A c + B f) / t against the projection itself."""
    n, T = 6, 1500
    a, b = hippo("legs", n)
    f = signal((torch.arange(T, dtype=torch.float64) + 0.5) / T)
    c, eye = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for t, ft in enumerate(f, 1):  # backward Euler: exact for LegS's first coefficient
        c = torch.linalg.solve(eye - a / t, c + b * ft / t)
    torch.testing.assert_close(c, projection(f, n, 1.0), rtol=0, atol=5e-3)
    assert projection(f, n, 1.0).abs().max() > 0.3


@pytest.mark.parametrize("measure", ["legt", "lmu"])
def test_legt_holds_the_last_window(measure: Measure) -> None:
    n, window = 12, 1000
    a, b = discretise(*hippo(measure, n), torch.tensor([1 / window], dtype=torch.float64), "zoh")
    f = signal(torch.arange(2 * window, dtype=torch.float64) / window)
    c = dense_ssm(f[None, :, None], a, b, b[:, None])[1][0, 0]
    places = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    # Coefficient n is that of P_n over the window: LegT in the orthonormal scale, newest at +1;
    # the LMU's are P_n of the delay, plain.
    scale = (2 * torch.arange(n) + 1).sqrt() if measure == "legt" else torch.ones(n)
    x = (2 * places - 1) * (1.0 if measure == "legt" else -1.0)
    decoded = torch.from_numpy(legendre.legvander(x.numpy(), n - 1)) @ (c * scale)
    error = (decoded - f[-window:]).square().mean() / f[-window:].var()
    assert error < 1e-3, "R^2 > 0.999"


def test_the_lmu_is_legt_in_another_scale() -> None:
    n = 7
    (a, b), (la, lb) = hippo("legt", n), hippo("lmu", n)
    p = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt() * (-1.0) ** torch.arange(n)
    torch.testing.assert_close(p[:, None] * a / p, la)
    torch.testing.assert_close(p * b, lb)


def test_fourier_holds_the_last_window() -> None:
    n, T = 64, 4000
    a, b = discretise(*hippo("fourier", n), torch.tensor([1 / T], dtype=torch.float64), "bilinear")
    t = torch.arange(3 * T, dtype=torch.float64) / T
    f = torch.sin(2 * math.pi * t) + 0.3  # periodic in the window: no edge effect
    c = dense_ssm(f[None, :, None], a, b, b[:, None])[1][0, 0]
    energy = c.square().sum()
    torch.testing.assert_close(energy, f[-T:].square().mean(), rtol=2e-2, atol=0)
    assert c[2:4].square().sum() > 0.9 * 0.5 and abs(c[0] - 0.3) < 0.02


def test_lagt_holds_coefficients_of_laguerre_functions() -> None:
    """``c_n = int f(t - s) L_n(s) exp(-s / 2) ds``."""
    n, step, T = 5, 0.01, 6000
    a, b = discretise(*hippo("lagt", n), torch.tensor([step], dtype=torch.float64), "zoh")
    f = signal(torch.arange(T, dtype=torch.float64) * step / 10)
    c = dense_ssm(f[None, :, None], a, b, b[:, None])[1][0, 0]
    ago = (torch.arange(T, dtype=torch.float64).flip(0) + 0.5) * step
    basis = torch.from_numpy(laguerre.lagvander(ago.numpy(), n - 1)) * (-ago / 2).exp()[:, None]
    torch.testing.assert_close(c, (basis * f[:, None]).sum(0) * step, rtol=1e-3, atol=1e-4)


def test_zoh_is_exact_for_held_inputs_and_the_others_come_near() -> None:
    a, b = hippo("legt", 4)
    small = torch.tensor([1e-3], dtype=torch.float64)
    exact = discretise(a, b, small, "zoh")
    many = discretise(a, b, small / 8, "zoh")  # 8 short steps of one input
    A, B = (
        torch.linalg.matrix_power(many[0], 8),
        sum(torch.linalg.matrix_power(many[0], k) @ many[1][..., None] for k in range(8)),
    )
    torch.testing.assert_close(A, exact[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(B[..., 0], exact[1], rtol=1e-11, atol=1e-13)
    far = {h: (discretise(a, b, small, h)[0] - A).abs().max() for h in ("euler", "bilinear")}
    assert far["bilinear"] < 0.05 * far["euler"] < 1e-4


def test_nplr_is_legs() -> None:
    """V (diag(L) - P P^*) V^* has the same transfer function B^T (s - A)^-1 B as LegS."""
    n = 8
    a, b = hippo("legs", n)
    rate, p, driven = nplr_legs(n)
    rate, p, driven = (torch.cat((x, x.conj())) for x in (rate, p, driven))
    for s in (1 + 0j, 0.3 + 2j, 5j):
        eye = torch.eye(n, dtype=torch.complex128)
        expected = b.to(eye.dtype) @ torch.linalg.solve(s * eye - a, b.to(eye.dtype))
        inner = torch.diag(rate) - torch.outer(p, p.conj())
        got = driven.conj() @ torch.linalg.solve(s * eye - inner, driven)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def cauchy_kernel(layer: S4, L: int) -> Tensor:
    """`(D, L)` as the paper has it.

    Truncated generating function at the roots of unity by Woodbury and Cauchy dot products, then an
    inverse Fourier transform.
    """
    wide = torch.complex128
    both = lambda x: torch.cat((x, x.conj()), -1)
    rate = both(torch.complex(-layer.log_rate.exp(), layer.frequency))
    p, b, c = (both(torch.complex(*x)) for x in (layer.low_rank, layer.drive, layer.readout))
    dt = layer.log_step.exp()
    n = rate.shape[-1]
    out = []
    for d in range(len(dt)):
        A = torch.diag(rate[d]) - torch.outer(p[d], p[d].conj())
        eye = torch.eye(n, dtype=wide)
        bar = torch.linalg.solve(eye - dt[d] / 2 * A, eye + dt[d] / 2 * A)
        truncated = c[d] @ (eye - torch.linalg.matrix_power(bar, L))
        z = torch.exp(-2j * math.pi * torch.arange(L, dtype=torch.float64) / L)
        # z = -1 is a pole of the bilinear map: step aside, and take the limit's mean.
        z = torch.where((z + 1).abs() < 1e-9, z * (1 + 1e-9), z)
        g = 2 / dt[d] * (1 - z) / (1 + z)
        cauchy = 1 / (g[:, None] - rate[d])
        top, right = cauchy @ (truncated * b[d]), cauchy @ (truncated * p[d])
        left, corner = cauchy @ (p[d].conj() * b[d]), cauchy @ (p[d].conj() * p[d])
        spectrum = 2 / (1 + z) * (top - right * left / (1 + corner))
        out.append(torch.fft.ifft(spectrum).real)
    return torch.stack(out)


def made(config: S4Config | HiPPOConfig) -> S4 | HiPPOMemory:
    torch.manual_seed(0)
    layer = config.build(D).double()
    init_weights(layer)
    with torch.no_grad():
        for q in layer.parameters():
            q.add_(0.05 * torch.randn_like(q))
    return layer


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 130])
def test_s4_equals_the_papers_cauchy_kernel_and_fourier_convolution(T: int) -> None:
    layer, (x,) = made(S4Config(states=8)), documents(T)
    assert isinstance(layer, S4)
    L = T + T % 2 + 1  # odd: -1 is no root of unity
    kernel = cauchy_kernel(layer, L)[:, :T]
    y = torch.fft.irfft(torch.fft.rfft(x.T, 2 * L) * torch.fft.rfft(kernel, 2 * L), 2 * L)[:, :T].T
    expected = layer.out(torch.nn.functional.gelu(y + layer.skip * x))
    torch.testing.assert_close(alone(layer, x), expected, rtol=1e-7, atol=1e-8)


def test_s4_with_half_the_step_sees_a_signal_sampled_twice_as_often() -> None:
    layer = made(S4Config(states=16))
    assert isinstance(layer, S4)
    t = torch.arange(400, dtype=torch.float64)
    f = torch.sin(t / 40)[:, None].expand(-1, D)
    fine = torch.sin(torch.arange(800, dtype=torch.float64) / 80)[:, None].expand(-1, D)
    with torch.no_grad():
        layer.log_step.fill_(math.log(0.02))
        coarse = alone(layer, f)
        layer.log_step.fill_(math.log(0.01))
        torch.testing.assert_close(alone(layer, fine)[::2][50:], coarse[50:], rtol=0, atol=0.08)


@pytest.mark.parametrize("measure", ["legs", "lagt"])
def test_the_learned_transition_begins_as_hippo_and_is_learned(measure: Measure) -> None:
    layer = HiPPOConfig(states=6, measure=measure, trainable=True).build(D).double()
    init_weights(layer)
    a, b = hippo(measure, 6)
    torch.testing.assert_close(layer.transition(torch.float64), a)
    (x,) = documents(9)
    fixed = HiPPOConfig(states=6, measure=measure).build(D).double()
    own = {k: v for k, v in layer.state_dict().items() if k in fixed.state_dict()}
    fixed.load_state_dict(own)
    torch.testing.assert_close(alone(layer, x), alone(fixed, x))
    alone(layer, x).square().sum().backward()
    for p in (layer.scales, layer.diagonal, layer.bands):
        assert p.grad is not None and p.grad.abs().max() > 1e-6
    with pytest.raises(ValueError, match="trainable"):
        HiPPOConfig(measure="legt", trainable=True)


@pytest.mark.parametrize("trainable", [False, True])
def test_lssl_equals_the_step_by_step_recurrence(trainable: bool) -> None:
    layer, (x,) = made(HiPPOConfig(states=5, readouts=3, trainable=trainable)), documents(70)
    assert isinstance(layer, HiPPOMemory)
    a, b = hippo("legs", 5)
    if trainable:
        below, on, above = layer.bands
        T = torch.zeros(5, 5, dtype=torch.float64)
        for i in range(5):
            T[i, i] = on[i]
            if i < 4:
                T[i + 1, i], T[i, i + 1] = below[i], above[i]
        P, Q = (torch.diag(s) for s in layer.scales)
        a = -P @ (torch.diag(layer.diagonal) + torch.linalg.inv(T)) @ Q
    dt = layer.log_step.exp()
    ys = []
    for d in range(D):
        near = torch.eye(5) - dt[d] / 2 * a
        A = torch.linalg.inv(near) @ (torch.eye(5) + dt[d] / 2 * a)
        B, h, y = torch.linalg.inv(near) @ b * dt[d], torch.zeros(5, dtype=torch.float64), []
        for u in x[:, d]:
            h = A @ h + B * u
            y.append(layer.readout[d] @ h)
        ys.append(torch.stack(y))
    y = torch.nn.functional.gelu(torch.stack(ys, 1).flatten(1))
    torch.testing.assert_close(alone(layer, x), layer.out(y) + layer.skip * x)


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("shared", [False, True])
def test_dense_ssm_equals_its_reference_in_all_gradients(T: int, shared: bool) -> None:
    torch.manual_seed(1)
    G, r = 1 if shared else 3, lambda *s: torch.randn(*s, dtype=torch.float64)
    args = [r(2, T, 3), 0.2 * r(G, 4, 4), r(G, 4), r(G, 2, 4), r(2, 3, 4)]
    for x in args:
        x.requires_grad_()
    length = torch.tensor([T, T // 2])
    found = []
    for name in ("reference", "chunked"):
        with dense_ssm.using(name):
            y, last = dense_ssm(*args, length)
        total = y.sin().sum() + last.cos().sum()
        found.append((y, last, *torch.autograd.grad(total, args)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_long_memories_stay_bounded_in_float32() -> None:
    layer = S4Config(states=64).build(D)
    init_weights(layer)
    with torch.no_grad():
        a, b, c = layer.matrices()
        torch.manual_seed(0)
        y, _ = dense_ssm(torch.randn(1, 3000, D), a, b, c)
        assert y.isfinite().all() and y.std() < 100
        assert torch.linalg.eigvals(a.double()).abs().max() < 1


def test_settings_that_do_not_fit_are_refused() -> None:
    for kind, bad in (
        ("s4", {"states": 3}),
        ("s4", {"step_min": 1.0}),
        ("hippo", {"measure": "fourier", "states": 3}),
        ("hippo", {"step_min": 1.0}),
    ):
        with pytest.raises(ValueError):
            MIXERS.get(kind)(**bad)


def test_s5_is_the_state_space_in_full_matrices() -> None:
    """Real 2W x 2W dynamics of (Re h, Im h) by the exact zoh of `discretise`.

    There are no complex numbers in it.
    """
    torch.manual_seed(0)
    layer = S5Config(states=4, blocks=2).build(D).double()
    init_weights(layer)
    (x,), W = documents(30), 4
    re, im = -layer.log_rate.exp(), layer.frequency
    dynamics = torch.zeros(2 * W, 2 * W, dtype=torch.float64)
    at = torch.arange(W)
    dynamics[at, at] = dynamics[at + W, at + W] = re.detach()
    dynamics[at, at + W], dynamics[at + W, at] = -im.detach(), im.detach()
    dynamics = layer.log_step.detach().exp().repeat(2)[:, None] * dynamics
    drive = layer.log_step.detach().exp().repeat(2)[:, None] * layer.inner.weight.detach()
    h, ys = torch.zeros(2 * W, dtype=torch.float64), []
    for u in x:
        whole = torch.zeros(2 * W + 1, 2 * W + 1, dtype=torch.float64)
        whole[:-1, :-1], whole[:-1, -1] = dynamics, drive @ u
        moved = torch.linalg.matrix_exp(whole)
        h = moved[:-1, :-1] @ h + moved[:-1, -1]
        ys.append(torch.nn.functional.gelu(layer.out(h) + layer.skip * u))
    torch.testing.assert_close(alone(layer, x), torch.stack(ys))


@pytest.mark.parametrize("T", [1, 3, 16])
def test_s4_steps_as_it_scans_in_all_gradients_and_builds_no_matrix(
    T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = made(S4Config(states=64))
    (x,) = documents(40 + T)
    layout = lambda n, at: Layout.from_rows([[Doc(n, slot=0, fresh=at == 0, start=at)]])
    found = []
    for stepped in (True, False):
        inputs = x.clone().requires_grad_()
        state = layer(inputs[None, :40], Ctx(layout(40, 0), Causal()), layer.initial_state(1, 1))
        rest, ctx = inputs[None, 40:], Ctx(layout(T, 40), Causal())
        with monkeypatch.context() as patch:
            if stepped:
                patch.setattr(S4, "matrices", lambda self: pytest.fail("a step needs no matrix"))
            else:
                patch.setattr(s4, "STEPS", 0)
            out = layer(rest, ctx, state.state)
        assert out.state is not None
        loss = out.y.sin().sum() + out.state.h.cos().sum()  # type: ignore[attr-defined]
        grads = torch.autograd.grad(loss, [inputs, *layer.parameters()])
        found.append([out.y, *out.state.leaves(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
