"""Spectra of the codec's losses: the power spectrum's own gradient against autograd's."""

from __future__ import annotations

import pytest
import torch

from mm.tokenizers.audio.mel import Power


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_power_spectrum_and_its_gradient(n: int) -> None:
    torch.manual_seed(n)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    above = torch.rand(2, 3, n // 2 + 1, dtype=torch.float64)
    spectrum = torch.fft.rfft(same)
    expected = spectrum.real.square() + spectrum.imag.square()
    power = Power.apply(x)
    torch.testing.assert_close(power, expected)
    power.backward(above)
    expected.backward(above)
    torch.testing.assert_close(x.grad, same.grad)
    assert torch.autograd.gradcheck(Power.apply, (x,))
