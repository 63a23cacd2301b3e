"""Tasks: hand-counted figures, judges on real data, a small model that knows three classes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mm.data.batching.document import document_tokens
from mm.data.modalities.audio import audio_features
from mm.data.modalities.base import modality_of_value
from mm.data.modalities.image import image_features
from mm.errors import UserError
from mm.specs import FloatArray, Segment, TokenSpec, Waveform
from mm.tasks.base import Settings, chance, choose, confusion, first_class, label_of, spread
from mm.tasks.bits_per_byte import uniform_nats, windows
from mm.tasks.judges import Judge, linear_probe
from mm.vocabulary import extend_vocabulary


def test_first_class_takes_whole_words_in_order_and_the_longer_of_two():
    classes = ("cat", "dog", "hot dog")
    assert first_class("a Dog and a cat", classes) == "dog"
    assert first_class("the hot dog", classes) == "hot dog"
    assert first_class("concatenate dogs", classes) is None
    assert first_class("cat", ()) is None


def test_label_comes_from_metadata_then_from_the_caption():
    shards = lambda meta, text: SimpleNamespace(
        meta=lambda i: meta, raw=lambda i, m: ("txt", text.encode()) if text else None
    )
    classes = ("zero", "one")
    assert label_of(shards({"label": "one"}, "zero"), 0, classes) == "one"
    assert label_of(shards({"label": 1}, ""), 0, classes) == "one"
    assert label_of(shards({"label": 7}, ""), 0, ()) == "7"
    assert label_of(shards({}, "the digit zero"), 0, classes) == "zero"
    assert label_of(shards({}, "prose"), 0, classes) is None


def test_chance_is_the_commonest_class():
    assert chance(["a", "a", "b", "c"], 3) == 0.5
    assert chance(["a", "b"], 2) == 0.5
    assert chance(["a", "b", "c", "d"], 4) == 0.25


def test_confusion_counts_answers_outside_the_classes():
    assert confusion(["a", "a", "b"], ["a", "b", None], ["a", "b"]) == [[1, 1, 0], [0, 0, 1]]


def test_choose_takes_the_best_and_the_earlier_of_equals():
    grid = (Settings(temperature=1.0), Settings(temperature=0.7), Settings(temperature=0.5))
    scores = {1.0: 0.2, 0.7: 0.9, 0.5: 0.9}
    best, tried = choose(grid, lambda s: scores[s.temperature])
    assert best.temperature == 0.7
    assert [t["accuracy"] for t in tried] == [0.2, 0.9, 0.9]
    assert choose(grid[:1], lambda s: pytest.fail("one candidate needs no run")) == (grid[0], [])


def test_spread_is_even_and_complete():
    assert spread(3, None) == [0, 1, 2]
    assert spread(101, 3) == [0, 50, 100]
    assert len(set(spread(1000, 300))) == 300


def test_raw_bytes():
    raw_bytes = lambda value: modality_of_value(value).n_bytes(value)
    assert raw_bytes("é") == 2
    assert raw_bytes(b"abc") == 3
    assert raw_bytes(np.zeros((4, 5, 3), np.uint8)) == 60
    assert raw_bytes(Waveform(np.zeros(10, np.float32), 16000)) == 20


def test_uniform_nats_counts_every_choice_of_the_grammar():
    assert uniform_nats(4, TokenSpec("image", 8, grid=(2, 2))) == pytest.approx(4 * math.log(8))
    # 8 choices for the first id; then 9 (8 codes or the end), the end included
    assert uniform_nats(3, TokenSpec("text", 8)) == pytest.approx(math.log(8) + 3 * math.log(9))
    assert uniform_nats(4, TokenSpec("audio", 8, n_codebooks=2)) == pytest.approx(
        3 * math.log(8) + 2 * math.log(9)
    )


@pytest.mark.parametrize("n", [8, 9, 14, 15, 16, 33])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_windows_score_every_id_and_the_end_exactly_once(n, overlap):
    spec = TokenSpec("text", 50)
    vocabulary = extend_vocabulary([spec])
    span = Segment("text", np.arange(n))
    pieces = windows(span, spec, 8, overlap)
    scored = []
    for i, piece in enumerate(pieces):
        assert len(piece.ids) <= 8
        tokens = document_tokens([piece], vocabulary)
        scored += tokens.targets[tokens.weights > 0].tolist()
        if i and overlap == 0.5:  # context before the first scored id
            assert tokens.weights[:3].sum() == 0
    r = vocabulary.range("text")
    assert scored == [*range(r.first, r.first + n), r.end]


def test_windows_move_on_by_the_share_that_is_no_context():
    starts = lambda overlap: [
        int(p.ids[0])
        for p in windows(Segment("text", np.arange(20)), TokenSpec("text", 50), 8, overlap)
    ]
    assert starts(0.0) == [0, 8, 16]
    assert starts(0.5) == [0, 4, 8, 12]
    assert starts(0.75) == [0, 2, 4, 6, 8, 10, 12]
    assert starts(0.99) == list(range(13)), "at least one id"


def test_windows_cut_at_frame_borders_and_never_cut_a_grid():
    pieces = windows(
        Segment("audio", np.arange(12) % 9), TokenSpec("audio", 9, n_codebooks=2), 9, 0.4
    )
    assert all(len(p.ids) % 2 == 0 for p in pieces) and len(pieces) > 1
    grid = Segment("image", np.arange(70))
    assert windows(grid, TokenSpec("image", 99, grid=(70,)), 8, 0.5) == [grid]


@pytest.fixture(scope="module")
def digits():
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    enlarge = lambda x: np.asarray(
        Image.fromarray((x * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB")
    )
    return [enlarge(x) for x in data.images[:900]], [str(y) for y in data.target[:900]]


def test_image_judge_and_linear_probe_on_real_scans(digits):
    images, labels = digits
    judge = Judge("image").fit(images[:700], labels[:700])
    assert judge.accuracy(images[700:], labels[700:]) > 0.9
    assert linear_probe(images[:700], labels[:700], images[700:], labels[700:]) > 0.8
    assert image_features(images[:2]).shape == (2, 256)
    wrong = [str((int(y) + 1) % 10) for y in labels[700:]]
    assert judge.accuracy(images[700:], wrong) < 0.1


def test_audio_features_ignore_level_and_silence_around():
    from scipy.signal import butter, resample_poly, sosfilt

    rng = np.random.default_rng(0)
    sweep = lambda f: np.sin(2 * np.pi * np.cumsum(np.linspace(f, 2 * f, 8000)) / 16000).astype(
        np.float32
    )
    clip = Waveform(sweep(300) * 0.5, 16000)
    quiet = Waveform(np.pad(clip.samples * 0.3, (1600, 3200)), 16000)
    other = Waveform(sweep(900) * 0.5, 16000)
    a, b, c = audio_features([clip, quiet, other])
    assert np.abs(a - b).mean() < 0.2 * np.abs(a - c).mean()
    silent = audio_features(
        [Waveform(np.zeros(10, np.float32), 16000), Waveform(np.zeros(0, np.float32), 8000)]
    )
    assert np.isfinite(silent).all()
    voice = lambda f: (
        sweep(f * (0.8 + 0.4 * rng.random())) + 0.02 * rng.standard_normal(8000).astype(np.float32)
    )
    clips = [Waveform(voice(f), 16000) for f in (300, 900) for _ in range(8)]
    names = ["low"] * 8 + ["high"] * 8
    held_out = [Waveform(0.3 * voice(f), 16000) for f in (300, 900)]
    assert Judge("audio").fit(clips, names).accuracy(held_out, ["low", "high"]) == 1.0
    # Recordings of half the rate, and what a codec of the whole rate makes of them: noise above.
    narrow = [Waveform(resample_poly(c.samples, 1, 2), 8000) for c in clips]
    above = butter(8, 4500, "highpass", fs=16000, output="sos")
    noise = lambda: np.asarray(sosfilt(above, 0.05 * rng.standard_normal(8000)), np.float32)
    made = [Waveform(voice(f) + noise(), 16000) for f in (300, 900) for _ in range(4)]
    judge = Judge("audio").fit(narrow, names)
    assert judge.accuracy(made, ["low"] * 4 + ["high"] * 4) == 1.0


def test_judge_refuses_one_class_and_text():
    with pytest.raises(UserError, match="two classes"):
        Judge("image").fit([np.zeros((8, 8, 3), np.uint8)] * 2, ["a", "a"])
    with pytest.raises(UserError, match="no judge for 'text'"):
        Judge("text")


def test_a_judge_and_a_probe_see_the_elements() -> None:
    rng = np.random.default_rng(3)
    labels = ["low", "high"] * 40
    arrays = [FloatArray((rng.normal(0, 1, (2, 3)) + (i % 2) * 4).astype("f4")) for i in range(80)]
    assert linear_probe(arrays[:60], labels[:60], arrays[60:], labels[60:], "array") > 0.9
    shuffled = [labels[i] for i in rng.permutation(60)]
    assert linear_probe(arrays[:60], shuffled, arrays[60:], labels[60:], "array") < 0.9
    judge = Judge("array").fit(arrays[:60], labels[:60])
    assert judge.accuracy(arrays[60:], labels[60:]) > 0.9
    with pytest.raises(UserError, match=r"needs one shape: \(2, 3\) and \(3, 2\)"):
        judge.predict([FloatArray(np.zeros((3, 2), np.float32))])
