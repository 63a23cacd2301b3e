"""Frames, windows and log-mel spectra shared by the codec, its losses and its figures.

G items, N samples, F frames, M mels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.lru_cache(maxsize=128)
def hann_window(n_fft: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Periodic Hann window (n_fft,). A cached constant: no buffer to initialise, save or shard."""
    return torch.hann_window(n_fft, dtype=torch.float64).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=128)
def mel_filterbank(
    n_fft: int, n_mels: int, sample_rate: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Triangular filters (n_fft // 2 + 1, n_mels) on the HTK mel scale, 0 Hz to the Nyquist rate.

    A filter narrower than one bin (small ``n_fft``, many mels) is widened to the bin nearest its
    centre, so none is empty.
    """
    bins_hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges_hz = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    up = (bins_hz[:, None] - low) / (centre - low)
    down = (high - bins_hz[:, None]) / (high - centre)
    bank = torch.minimum(up, down).clamp_min(0)
    nearest = (bins_hz[:, None] - centre).abs().argmin(0)
    empty = bank.sum(0) == 0
    bank[nearest[empty], torch.arange(n_mels)[empty]] = 1.0
    return bank.to(device=device, dtype=dtype)


def frames(wave: Tensor, n_fft: int, hop: int, left: int) -> Tensor:
    """Cut (G, N) into windows (G, ceil(N / hop), n_fft).

    Frame i covers samples ``i * hop - left ... + n_fft``, zeros outside.
    """
    n = -(-wave.shape[-1] // hop)
    right = max(0, (n - 1) * hop + n_fft - left - wave.shape[-1])
    return nnf.pad(wave, (left, right)).unfold(-1, n_fft, hop)[:, :n]


class Power(torch.autograd.Function):
    """Power spectrum ``|rfft(x)|^2``, (..., n) real to (..., n // 2 + 1), n even.

    Its gradient is one inverse transform of real values; autograd's own takes a complex one of
    twice the size. With p_k = |S_k|^2: dp_k / dx_m = 2 Re(S_k exp(2 pi i k m / n)), and irfft
    doubles every bin but the first and the last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        ctx.save_for_backward(spectrum)
        return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = torch.view_as_real(*ctx.saved_tensors)
        n = 2 * (parts.shape[-2] - 1)
        weighted = parts * (grad * n)[..., None]
        weighted[..., 0, :] *= 2
        weighted[..., -1, :] *= 2
        return torch.fft.irfft(torch.view_as_complex(weighted), n)


def magnitude(wave: Tensor, n_fft: int, hop: int, left: int) -> Tensor:
    """Hann-windowed magnitudes (G, F, n_fft // 2 + 1) of (G, N); a full-scale sine peaks near 1."""
    window = hann_window(n_fft, wave.dtype, wave.device)
    # sqrt has no gradient at 0, and padding is exactly 0: the floor is far below every log-mel
    # floor
    power = Power.apply(frames(wave, n_fft, hop, left) * window)
    return (power + 1e-14).sqrt() * (2 / n_fft)


def log_mel(
    wave: Tensor,
    *,
    sample_rate: int,
    n_mels: int = 64,
    n_fft: int = 1024,
    hop: int = 160,
    left: int | None = None,
    floor: float = 1e-5,
) -> Tensor:
    """Natural logarithm of the mel magnitude spectrum, floored.

    Args:
        wave: (G, N) float32 or float64.
        left: samples of frame i before ``i * hop``; default half the window (centred frames).
            ``n_fft - hop`` makes frame i end with sample ``(i + 1) * hop``: no look-ahead.

    Returns:
        (G, ceil(N / hop), n_mels), the dtype of ``wave``.
    """
    bank = mel_filterbank(n_fft, n_mels, sample_rate, wave.dtype, wave.device)
    spectrum = magnitude(wave, n_fft, hop, n_fft // 2 if left is None else left)
    return (spectrum @ bank).clamp_min(floor).log()


def resample(samples: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample (N,) float32 by windowed-sinc interpolation (torchaudio, imported on first use)."""
    if source_rate == target_rate:
        return samples
    from torchaudio.functional import resample as resample_sinc

    return resample_sinc(samples, source_rate, target_rate)


def wave_of(spectrum_FB: Tensor, n_fft: int, hop: int) -> Tensor:
    """Samples `(F * hop,)` whose magnitudes are ``spectrum_FB``, the phases by Griffin and Lim."""
    from torchaudio.functional import griffinlim

    n = len(spectrum_FB) * hop
    given = torch.cat((spectrum_FB, spectrum_FB[-1:])).T[None]
    window = torch.hann_window(n_fft)
    return griffinlim(given, window, n_fft, hop, n_fft, 1.0, 32, 0.99, n, False)[0]
