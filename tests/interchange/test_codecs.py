"""Codecs as tokenizers: the codes and the sound of `transformers`; what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_codecs import CASES, IMAGES, RATE, VQGAN, codec, image_tokenizer, wave

from mm.errors import UserError
from mm.interchange.family import Settings
from mm.interchange.read import read_settings
from mm.interchange.read_codec import TOLERANCE, import_codec
from mm.registry import CODECS
from mm.specs import Waveform
from mm.tokenizers.audio import codec as audio_codec
from mm.tokenizers.audio.codec import AudioCodec
from mm.tokenizers.load import load_tokenizer


def marked(cases: Iterable[str], slow: str) -> list[Any]:
    """The cases, one of them in the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == slow else name for name in cases]


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


@pytest.mark.parametrize("case", marked(CASES, "encodec, looks ahead"))
def test_codes_and_sound_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    peer = codec(tmp_path / "given", case)
    report = import_codec(tmp_path / "given", tmp_path / "ours", read_settings(tmp_path / "given"))
    assert report is not None and report.different == 0 and report.codes > 50
    print(f"{case}: {report.codes} codes the same, samples differ by {report.difference:.1e}")
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
def test_a_long_signal_in_chunks_has_the_codes_of_the_whole(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    codec(given, case)
    import_codec(given, tmp_path / "ours", read_settings(given), check=False)
    tokenizer: Any = load_tokenizer(tmp_path / "ours")
    hop = tokenizer.net.samples_per_frame
    x = Waveform(wave(60 * hop + hop // 2 + 1), RATE)
    (whole,) = tokenizer.encode([x])
    calls: list[int] = []
    stream = AudioCodec.encode_stream
    count = lambda net, part, kept: (calls.append(part.shape[1]), stream(net, part, kept))[1]
    monkeypatch.setattr(AudioCodec, "encode_stream", count)
    monkeypatch.setattr(audio_codec, "LONG", 17)
    (chunked,) = tokenizer.encode([x])
    assert calls == [17 * hop] * 3 + [9 * hop + hop // 2 + 1]
    assert np.array_equal(chunked.ids, whole.ids)


@pytest.mark.parametrize("family", marked(IMAGES, "janus"))
def test_codes_and_pixels_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "ours"
    peer = image_tokenizer(given, family)
    report = import_codec(given, out, read_settings(given))
    assert report is not None and report.different == 0 and report.codes == 128
    print(f"{family}: {report.codes} codes the same, pixels differ by {report.difference:.1e}")
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


KEYS: dict[str, list[tuple[str, Any]]] = {
    "encodec": [
        ("audio_channels", 2),
        ("norm_type", "time_group_norm"),
        ("normalize", True),
        ("chunk_length_s", 1.0),
        ("trim_right_ratio", 0.5),
        ("pad_mode", ["circular"]),
        ("use_causal_conv", "no"),
        ("codebook_dim", 4),
        ("codebook_size", 1),
        ("target_bandwidths", [float("nan")]),
        ("upsampling_ratios", [0]),
        ("num_filters", 10**9),
    ],
    "mimi": [
        ("audio_channels", 2),
        ("use_causal_conv", False),
        ("attention_bias", True),
        ("hidden_act", "swish2"),
        ("frame_rate", 7.0),
        ("codebook_dim", 5),
        ("num_hidden_layers", 10**6),
    ],
    "dac": [("hop_length", 7), ("hidden_size", 5), ("decoder_hidden_size", 6)],
    "janus_vqgan": [("double_latent", True), ("in_channels", 1), ("channel_multiplier", 2)],
}


@pytest.mark.parametrize("family", KEYS)
def test_a_key_without_an_equal_is_named(family: str) -> None:
    settings = next((case[3] for case in CASES.values() if case[0] == family), VQGAN)
    kind: Any = CODECS.parse(family)
    none = Settings({}, "preprocessor_config.json")
    kind.network(Settings(settings, "config.json"), none, None)
    for key, value in KEYS[family]:
        with pytest.raises(UserError, match=f"^config.json: {key} = "):
            kind.network(Settings({**settings, key: value}, "config.json"), none, None)


def test_refusals_of_encodec(tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    codec(given, "encodec")
    kept = (given / "config.json").read_text()
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
