"""Front ends of the audio codec: reach, chunk by chunk, spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_toys import FRONT_ENDS, codec, speech_like

from mm.tokenizers.audio.mel import frames, hann_window, log_mel, mel_filterbank
from mm.tokenizers.audio.melcodec import IstftHead

# ---- front ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_encoder_sees_no_sample_beyond_its_frame(name):
    front = codec(name).double().frontend
    hop, n = front.samples_per_frame, 12
    x = torch.from_numpy(speech_like(n * hop)).double()[None]
    with torch.no_grad():
        z = front.encode(x)
        assert z.shape == (1, n, 6) and front.encode_lookahead == 0
        for frame in (1, 5, 11):
            later = x.clone()
            later[:, frame * hop :] += torch.randn(1, (n - frame) * hop)
            assert torch.equal(front.encode(later)[:, :frame], z[:, :frame])
            last = x.clone()
            last[:, frame * hop - 1] += 1.0  # the last sample of frame - 1 does count
            assert not torch.equal(front.encode(last)[:, frame - 1], z[:, frame - 1])


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_decoder_looks_ahead_exactly_as_far_as_it_declares(name):
    front = codec(name).double().frontend
    hop, n = front.samples_per_frame, 12
    z, valid = torch.randn(1, n, 6, dtype=torch.float64), torch.ones(1, n, dtype=torch.bool)
    with torch.no_grad():
        wave = front.decode(z, valid)
        assert wave.shape == (1, n * hop)
        for frame in (3, 8):
            later = z.clone()
            later[:, frame:] += torch.randn(1, n - frame, 6)
            first = int((front.decode(later, valid) != wave)[0].nonzero()[0])
            start = frame * hop - front.decode_lookahead
            # the outermost sample of a Hann window is 0
            assert start <= first <= start + (1 if name == "mel" else 0)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_chunk_by_chunk_encoding_equals_offline(name):
    net = codec(name).double().eval()
    hop = net.samples_per_frame
    x = torch.from_numpy(np.stack([speech_like(14 * hop, s) for s in (1, 2)])).double()
    with torch.no_grad():
        z = net.frontend.encode(x)
        stream: dict = {}
        chunks = [
            net.frontend.encode(part, stream)
            for part in x.split([3 * hop, hop, 6 * hop, 4 * hop], dim=1)
        ]
        torch.testing.assert_close(torch.cat(chunks, dim=1), z, rtol=0, atol=1e-12)
        stream = {}
        ids = torch.cat(
            [net.encode_stream(part, stream) for part in x.split(2 * hop, dim=1)], dim=1
        )
        assert torch.equal(ids, net.encode(x, torch.tensor([14 * hop] * 2)))


@pytest.mark.parametrize("name", ["seanet", "seanet_lstm", "seanet_transformer"])
def test_chunk_by_chunk_decoding_equals_offline(name):
    front = codec(name).double().frontend
    z, valid = torch.randn(2, 11, 6, dtype=torch.float64), torch.ones(2, 11, dtype=torch.bool)
    with torch.no_grad():
        wave, stream = front.decode(z, valid), {}
        chunks = [front.decode(part, valid, stream) for part in z.split([1, 4, 6], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), wave, rtol=0, atol=1e-12)


def test_istft_head_inverts_the_spectrum():
    head = IstftHead(8, n_fft=640, hop=160)
    x = torch.randn(2, 3200, dtype=torch.float64)
    window = hann_window(640, x.dtype, x.device)
    pieces = frames(x, 640, 160, 240) * window
    envelope = head._overlap_add(window.square().expand_as(pieces))
    again = head._overlap_add(pieces * window) / envelope
    torch.testing.assert_close(again, x, rtol=0, atol=1e-10)
    # and through magnitude and phase: the projection is replaced by its exact inverse for one known
    # frame sequence
    spectrum = torch.fft.rfft(pieces)
    head = IstftHead(642, 640, 160).double()
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(642))
        head.project.bias.zero_()
        parts = torch.cat([spectrum.abs().log(), spectrum.angle()], dim=-1)
        wave = head(parts, torch.ones(2, parts.shape[1], dtype=torch.bool))
    torch.testing.assert_close(wave, x, rtol=0, atol=1e-9)


def test_mel_filterbank_is_torchaudios_where_no_filter_is_empty():
    torchaudio = pytest.importorskip("torchaudio")
    for n_fft, n_mels in ((1024, 64), (640, 40)):
        mine = mel_filterbank(n_fft, n_mels, 16000, torch.float32, torch.device("cpu"))
        theirs = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0.0, 8000.0, n_mels, 16000, mel_scale="htk"
        )
        filled = theirs.sum(0) > 0
        torch.testing.assert_close(mine[:, filled], theirs[:, filled], rtol=1e-3, atol=1e-4)
        assert (mine.sum(0) > 0).all()


def test_log_mel_of_a_sine_peaks_in_its_band_near_full_scale():
    t = torch.arange(16000, dtype=torch.float64) / 16000
    mel = log_mel(torch.sin(2 * torch.pi * 1000 * t)[None], sample_rate=16000)[0, 50]
    bank = mel_filterbank(1024, 64, 16000, torch.float64, torch.device("cpu"))
    assert int(mel.argmax()) == int(bank[round(1000 * 1024 / 16000)].argmax())
    assert 0.4 < float(mel.max().exp()) < 1.5
