"""Reconstruction losses of the codec.

Sums over valid samples, with counts that follow from the lengths alone. G items, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.tokenizers.audio.mel import magnitude, mel_filterbank


def valid_samples(length_G: Tensor, n_samples: int) -> Tensor:
    """(G, N) bool: sample i of an item of ``length`` samples is real."""
    return torch.arange(n_samples, device=length_G.device) < length_G[:, None]


def mel_counts(length_G: Tensor, windows: Sequence[int]) -> Tensor:
    """Samples that all frames stand for, mean over scales: () float32, count of `mel_loss`."""
    total = torch.zeros((), device=length_G.device)
    for n_fft in windows:
        hop = n_fft // 4
        total = total + (((length_G + hop - 1) // hop) * hop).sum()
    return total / len(windows)


def mel_loss(
    wave_GN: Tensor,
    target_GN: Tensor,
    length_G: Tensor,
    *,
    sample_rate: int,
    windows: Sequence[int],
) -> Tensor:
    """Multi-scale mel distance |S - S'| + |log S - log S'|, summed over frames times their hop.

    Source: Defossez et al. 2022, arXiv:2210.13438, eq. 2 (L1 + L2 over scales 2^5..2^11). The
    second norm is an L1 of log spectra here, as in Kumar et al. 2023, arXiv:2306.06546, section
    3.4: quiet frames weigh as much as loud ones.

    Args:
        wave_GN: (G, N) reconstruction, zero beyond ``length``; computed in fp32.
        target_GN: (G, N) recording, zero beyond ``length``.
        windows: STFT lengths in samples; the hop is a quarter, mel bands are min(64, n_fft // 8).
    """
    total = wave_GN.new_zeros((), dtype=torch.float32)
    with torch.autocast(wave_GN.device.type, enabled=False):
        both = torch.cat([wave_GN.float(), target_GN.float()])
        for n_fft in windows:
            hop = n_fft // 4
            bank = mel_filterbank(n_fft, min(64, n_fft // 8), sample_rate, both.dtype, both.device)
            mel, goal = (magnitude(both, n_fft, hop, n_fft // 2) @ bank).clamp_min(1e-5).chunk(2)
            distance = (mel - goal).abs().mean(-1) + (mel.log() - goal.log()).abs().mean(-1)
            frame = torch.arange(distance.shape[1], device=distance.device) * hop
            total = total + (distance * (frame < length_G[:, None])).sum() * hop
    return total / len(windows)


def wave_loss(wave_GN: Tensor, target_GN: Tensor, length_G: Tensor) -> Tensor:
    """Sum over valid samples of |wave - target|; its denominator is the sum of lengths."""
    return (
        (wave_GN.float() - target_GN.float()).abs() * valid_samples(length_G, wave_GN.shape[1])
    ).sum()
