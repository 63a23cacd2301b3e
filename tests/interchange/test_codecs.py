"""Codecs as tokenizers: the codes and the sound of `transformers`; what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_codecs import CASES, IMAGES, RATE, codec, image_tokenizer, wave

from mm.errors import UserError
from mm.interchange.read import read_settings
from mm.interchange.read_codec import TOLERANCE, import_codec
from mm.registry import CODECS
from mm.specs import Waveform
from mm.tokenizers.load import load_tokenizer


def theirs(case: str, peer: Any, x: np.ndarray, books: int) -> tuple[torch.Tensor, np.ndarray]:
    """Codes `(F, Q)` and samples of `transformers`, in float32, of its own steps."""
    family, given = CASES[case][0], torch.from_numpy(x)[None, None]
    with torch.no_grad():
        if family == "encodec":
            rate = {2: 8.0, 4: 16.0, 3: 6.5}[books]
            out = peer.encode(given, bandwidth=rate)
            return out.audio_codes[0, 0].T, peer.decode(out.audio_codes, [None])[0][0, 0].numpy()
        if family == "dac":  # what its feature extractor does first
            filled = torch.nn.functional.pad(given, (0, -given.shape[-1] % peer.config.hop_length))
            codes = peer.encode(filled, n_quantizers=books).audio_codes
            return codes[0].T, peer.decode(audio_codes=codes).audio_values[0].numpy()
        out = peer.encode(given, num_quantizers=books)
        return out.audio_codes[0].T, peer.decode(out.audio_codes)[0][0, 0].numpy()


def test_every_family_has_a_case() -> None:
    assert {family for family, *_ in CASES.values()} | {*IMAGES} == {*CODECS}


@pytest.mark.parametrize("case", CASES)
def test_codes_and_sound_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    peer = codec(tmp_path / "given", case)
    report = import_codec(tmp_path / "given", tmp_path / "ours", read_settings(tmp_path / "given"))
    assert report is not None and report.different == 0 and report.codes > 50
    assert report.difference <= TOLERANCE and report.spread > 0.01
    ours: Any = load_tokenizer(tmp_path / "ours")
    hop = ours.net.samples_per_frame
    assert ours.sample_rate == RATE
    waves = [wave(n, n) for n in (1, hop - 1, 7 * hop, 7 * hop + 1, 40 * hop + hop // 2)]
    encoded = ours.encode([Waveform(x, RATE) for x in waves])
    assert len({int(i) for code in encoded for i in code.ids}) > 7
    for x, code, sound in zip(waves, encoded, ours.decode(encoded), strict=True):
        codes, samples = theirs(case, peer, x, ours.n_codebooks)
        assert np.array_equal(ours.frames(code.ids), codes.numpy())
        assert len(sound.samples) == len(x)
        wanted = samples[: len(x)].clip(-1, 1)
        assert np.abs(sound.samples[: len(wanted)] - wanted).max() <= 1e-5


@pytest.mark.parametrize("case", [name for name in CASES if "ahead" not in name])
def test_a_long_signal_in_chunks_has_the_codes_of_the_whole(case: str, tmp_path: Path) -> None:
    codec(tmp_path / "given", case)
    given = tmp_path / "given"
    import_codec(given, tmp_path / "ours", read_settings(given), check=False)
    tokenizer: Any = load_tokenizer(tmp_path / "ours")
    net, hop = tokenizer.net.double(), tokenizer.net.samples_per_frame
    x = torch.from_numpy(wave(60 * hop)).double()[None]
    with torch.no_grad():
        whole, stream = net.encode(x, torch.tensor([60 * hop])), {}
        parts = [net.encode_stream(part, stream) for part in x.split([20 * hop, hop, 39 * hop], 1)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("family", IMAGES)
def test_codes_and_pixels_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "ours"
    peer = image_tokenizer(given, family)
    report = import_codec(given, out, read_settings(given))
    assert report is not None and report.different == 0 and report.codes == 128
    assert report.difference <= TOLERANCE and report.spread > 0.05
    ours: Any = load_tokenizer(out)
    assert ours.spec.grid == (8, 8) and ours.spec.vocab_size == 50
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    encoded = ours.encode(list(images))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        codes = peer.encode(pixels).image_tokens.view(2, -1)
        wanted = (peer.decode(codes).clamp(-1, 1) + 1) * 127.5
    assert len(codes.unique()) > 10
    assert np.array_equal(np.stack([code.ids for code in encoded]), codes.numpy())
    found = np.stack(ours.decode(encoded)).astype(np.float32)
    assert np.abs(found - wanted.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 1e-3


def test_refusals_of_an_image_tokenizer(tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    image_tokenizer(given, "janus_vqgan")
    change(given / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    refused(given, "image_mean = .* only 0.5", out)
    change(given / "preprocessor_config.json", image_mean=0.5, size={"height": 32, "width": 32})
    refused(given, "size = .* is not that of config.json, 16", out)
    (given / "preprocessor_config.json").unlink()
    change(given / "config.json", channel_multiplier=[1, 2, 2])
    refused(given, "lacks .*; holds what no layer takes", out)
    change(given / "config.json", channel_multiplier=[1, 2], base_channels=40)
    refused(given, "base_channels = '40' is no multiple of 32", out)


def refused(given: Path, pattern: str, out: Path) -> None:
    with pytest.raises(UserError, match=pattern):
        import_codec(given, out, read_settings(given), check=False)
    assert not out.exists()


def change(path: Path, **more: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **more}))


def test_refusals_of_encodec(tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    codec(given, "encodec")
    kept = (given / "config.json").read_text()
    for key, value in (
        ("audio_channels", 2),
        ("norm_type", "time_group_norm"),
        ("normalize", True),
        ("chunk_length_s", 1.0),
        ("pad_mode", "circular"),
        ("codebook_dim", 4),
        ("target_bandwidths", []),
        ("upsampling_ratios", [0]),
        ("num_filters", 10**9),
    ):
        change(given / "config.json", **{key: value})
        refused(given, f"config.json: {key} = ", out)
        (given / "config.json").write_text(kept)
    change(given / "preprocessor_config.json", sampling_rate=16000)
    refused(given, "sampling_rate = '16000' is not that of config.json, 8000", out)
    change(given / "preprocessor_config.json", sampling_rate=RATE, feature_size=2)
    refused(given, "feature_size = '2'", out)
    (given / "preprocessor_config.json").write_text("[")
    refused(given, "preprocessor_config.json: not valid JSON", out)
    (given / "preprocessor_config.json").unlink()
    change(given / "config.json", num_filters=8)
    refused(given, "of different models", out)
    change(given / "config.json", num_filters=4, num_residual_layers=1)
    refused(given, "lacks .*; holds what no layer takes: ", out)
    (given / "config.json").write_text(kept)
    with pytest.raises(UserError, match="--books 5: .* has 4 codebooks"):
        import_codec(given, out, read_settings(given), check=False, books=5)
    weights = given / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(given, "damaged or no safetensors", out)
