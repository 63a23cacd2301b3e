"""Figures of `mm tokenizer eval`: known answers for known tokenizers, on every modality."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import soundfile
from PIL import Image

from mm.errors import UserError
from mm.specs import Encoded, ModalityTokenizer, TokenSpec, Waveform
from mm.tokenizers.audio.mel import log_mel
from mm.tokenizers.audio.tokenizer import AudioCodecTokenizerConfig
from mm.tokenizers.evaluate import (
    MEL_FLOOR,
    evaluate,
    histogram,
    loss_alerts,
    mel_distances_db,
    spread,
    usage_alerts,
)
from mm.tokenizers.image.patches import ImagePatchesConfig
from mm.tokenizers.text.bytes import BytesConfig


class Gray(ModalityTokenizer):
    """Images of one flat gray each: 16 levels, one token.

    A tokenizer whose every figure can be worked out by hand.
    """

    spec = TokenSpec("image", 16)

    def encode(self, raws):
        return [
            Encoded(np.array([int(r.mean()) // 16], np.int32), side={"size": r.shape[:2]})
            for r in raws
        ]

    def decode(self, codes):
        return [np.full((*c.side["size"], 3), int(c.ids[0]) * 16 + 8, np.uint8) for c in codes]

    def save(self, folder):
        raise NotImplementedError

    load = classmethod(lambda cls, folder: cls())


class Pcm(ModalityTokenizer):
    """8-bit samples as tokens, two books of 16 codes: high and low half."""

    spec = TokenSpec("audio", 16, n_codebooks=2, tokens_per_second=16000)

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def encode(self, raws):
        out = []
        for raw in raws:
            level = np.clip(np.round((raw.samples + 1) * 127.5), 0, 255).astype(np.int32)
            out.append(Encoded(np.stack([level // 16, 16 + level % 16], 1).reshape(-1)))
        return out

    def decode(self, codes):
        rows = [c.ids.reshape(-1, 2) for c in codes]
        return [
            Waveform(
                (((r[:, 0] * 16 + r[:, 1] - 16) / 127.5 - 1) * self.gain).astype(np.float32), 8000
            )
            for r in rows
        ]

    save = Gray.save
    load = classmethod(lambda cls, folder: cls())


def voices(n_items: int = 8, seconds: float = 0.6) -> list[Waveform]:
    rng = np.random.default_rng(0)
    t = np.arange(int(8000 * seconds)) / 8000
    out = []
    for _ in range(n_items):
        f = rng.uniform(120, 300) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(2, 5) * t))
        wave = sum(0.2 / k * np.sin(k * 2 * np.pi * np.cumsum(f) / 8000) for k in range(1, 9))
        out.append(Waveform((wave * np.sin(np.pi * t / seconds) ** 2).astype(np.float32), 8000))
    return out


def test_values_as_they_are_have_no_codes_to_measure():
    raws = [np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(UserError, match="gives the values as they are.* mm eval RUN"):
        evaluate(ImagePatchesConfig.smallest_tokenizer(), raws)


def test_text_bytes_cost_one_token_each():
    texts = ["one two three", "naïve 漢字", "x"]
    figures = evaluate(BytesConfig.smallest_tokenizer(), texts)
    n_bytes = sum(len(t.encode()) for t in texts)
    assert figures["tokens"] == n_bytes and figures["bytes_per_token"] == 1.0
    assert figures["fertility_tokens_per_word"] == n_bytes / 6
    assert figures["exact_round_trip_share"] == 1.0 and figures["alerts"] == []
    assert figures["items"] == 3 and figures["vocab_size"] == 256


def test_image_figures_by_hand(tmp_path):
    raws = [
        np.full((16, 16, 3), 16 * level + 8 + 4, np.uint8) for level in range(12)
    ]  # each is off by 4 of 255
    figures = evaluate(Gray(), raws, tmp_path)
    assert figures["psnr_db"] == pytest.approx(20 * math.log10(255 / 4), abs=1e-6)
    assert figures["bits_per_pixel"] == pytest.approx(4 / 256)
    assert figures["codebook_usage_share"] == [12 / 16] and figures["codebook_perplexity"] == [
        pytest.approx(12)
    ]
    assert 0.9 < figures["ssim"] <= 1 and figures["alerts"] == []
    from PIL import Image

    grid = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert (
        grid[0, 0].tolist() == [12] * 3 and grid[-1, 0].tolist() == [8] * 3
    )  # original above, reconstruction below
    json.dumps(figures)


def test_equal_images_have_a_finite_psnr_and_small_ones_no_ssim():
    figures = evaluate(Gray(), [np.full((8, 8, 3), 40, np.uint8)])
    assert figures["psnr_db"] == 100.0 and "ssim" not in figures


def test_a_gray_or_larger_original_is_compared_as_the_tokenizer_saw_it():
    from mm.registry import TOKENIZERS

    tokenizer = TOKENIZERS.get("image_vq").smallest_tokenizer()
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 255, (24, 40, 3), np.uint8)
    figures = evaluate(tokenizer, [wide, wide[:, :, 0], wide[:, :, :1]])
    assert 3 < figures["psnr_db"] < 40 and figures["items"] == 3
    assert figures["tokens_per_item"] == np.prod(tokenizer.spec.grid)


def test_audio_figures_and_files(tmp_path):
    raws = voices()
    figures = evaluate(Pcm(), raws, tmp_path)
    assert figures["bits_per_second"] == pytest.approx(8 * 8000) and figures[
        "tokens_per_second"
    ] == pytest.approx(16000)
    # 8-bit quantisation noise: step^2 / 12 below the signal's power
    power = np.mean([np.mean(r.samples**2) for r in raws])
    expected = 10 * math.log10(power / ((2 / 255) ** 2 / 12))
    assert figures["si_sdr_db"] == pytest.approx(expected, abs=1.5)
    assert figures["stoi"] > 0.85
    assert (
        figures["mel_distance_ratio"]
        == figures["mel_distance_db"] / figures["mel_distance_db_of_mean_spectrum"]
        < 0.7
    )
    import soundfile

    wave, rate = soundfile.read(tmp_path / "03_original.wav")
    assert rate == 8000 and np.abs(wave - raws[3].samples).max() < 1e-4
    again, _ = soundfile.read(tmp_path / "03_reconstructed.wav")
    assert 0 < np.abs(again - wave).max() < 0.005
    assert (tmp_path / "spectrograms.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(figures)


def test_mel_distance_in_db_is_the_gain_in_db():
    import torch

    rng = np.random.default_rng(0)
    loud = torch.from_numpy(
        (0.3 * rng.standard_normal(16000)).astype(np.float32)
    )  # every band far above the floor
    assert (log_mel(loud[None], sample_rate=16000, floor=MEL_FLOOR) > math.log(MEL_FLOOR) + 1).all()
    distance, baseline = mel_distances_db([(loud, loud / 2)], 16000)
    assert distance == pytest.approx(20 * math.log10(2), abs=0.01)
    assert baseline == pytest.approx(evaluate_by_hand(loud), rel=1e-4)
    assert mel_distances_db([(loud, loud)], 16000)[0] == 0


def evaluate_by_hand(wave) -> float:
    mel = log_mel(wave[None], sample_rate=16000, floor=MEL_FLOOR)[0].numpy()
    return float(np.abs(mel - mel.mean(0, keepdims=True)).mean() * 20 / math.log(10))


def test_an_untrained_codec_is_far_from_the_recording_and_says_so(tmp_path):
    figures = evaluate(AudioCodecTokenizerConfig.smallest_tokenizer(), voices(4, 1.0))
    assert figures["n_codebooks"] == 2 and len(figures["codebook_usage_share"]) == 2
    assert figures["mel_distance_ratio"] > 0.6 and figures["si_sdr_db"] < 0
    assert figures["bits_per_second"] == pytest.approx(2 * 25 * 3, rel=0.05)


def test_alert_under_half_of_what_was_possible():
    counts = np.zeros((3, 64), np.int64)
    counts[0, :20] = 50  # 31 % in use
    counts[1, :40] = 50
    counts[2, :5] = 2  # 10 tokens could use 16 % at most: 8 % is more than half of that
    alerts = usage_alerts(counts)
    assert len(alerts) == 1 and alerts[0].startswith("codebook 0 uses 31%")
    collapsed = evaluate(Gray(), [np.full((16, 16, 3), 40, np.uint8)] * 30)
    assert len(collapsed["alerts"]) == 1


def test_alert_where_little_comes_back():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (told,) = [a for a in evaluate(Gray(), [noise] * 4)["alerts"] if "dB" in a]
    assert told.startswith("pictures come back at") and "train a tokenizer" in told
    assert len(loss_alerts({"mel_distance_ratio": 0.71})) == 1
    assert loss_alerts({"mel_distance_ratio": 0.69, "psnr_db": 18.1}) == []


def test_histogram_takes_flattened_books_apart():
    counts = histogram(
        [
            Encoded(np.array([0, 4, 1, 5])),
            Encoded(np.array([], np.int32)),
            Encoded(np.array([1, 7])),
        ],
        2,
        4,
    )
    assert counts.tolist() == [[1, 2, 0, 0], [1, 1, 0, 1]]


def test_nothing_to_evaluate_is_said():
    with pytest.raises(UserError, match="empty"):
        evaluate(Gray(), [])
    with pytest.raises(UserError, match="cannot evaluate"):
        evaluate(Gray(), [3.0])
    with pytest.raises(UserError, match="every recording is empty"):
        evaluate(Pcm(), [Waveform(np.zeros(0, np.float32), 8000)])


def test_what_is_shown_is_spread_over_the_split(tmp_path) -> None:
    """Shards are in the order of keys, so often of classes: the first 16 would be of one."""
    shades = [16 * (i // 20) + 8 for i in range(200)]  # ten classes of twenty
    raws = [np.full((8, 8, 3), shade, np.uint8) for shade in shades]
    evaluate(Gray(), raws, tmp_path / "image")
    with Image.open(tmp_path / "image/reconstructions.png") as picture:
        row = np.asarray(picture.convert("L"))[4]
    assert {int(v) for v in row} - {255} == set(shades)
    texts = [f"class {i // 20}" for i in range(200)]
    evaluate(BytesConfig.smallest_tokenizer(), texts, tmp_path / "text")
    shown = (tmp_path / "text/reconstructions.txt").read_text()
    assert all(f"'class {n}'" in shown for n in range(10))
    assert spread([], 4) == [] and spread("abc", 16) == ["a", "b", "c"]
    clips = [Waveform(np.full(800, 0.1 * (i // 4), np.float32), 16000) for i in range(40)]
    evaluate(Pcm(), clips, tmp_path / "audio")
    levels = set()
    for file in sorted((tmp_path / "audio").glob("*_original.wav")):
        levels.add(round(float(soundfile.read(file)[0].mean()), 1))
    assert levels == {round(0.1 * n, 1) for n in range(10)}
