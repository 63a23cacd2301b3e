"""The `tokenizer round trip` law, over every registered tokenizer.

Whatever is added to TOKENIZERS is covered the day it is registered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mm.errors import UserError
from mm.hashes import FILE as HASHES
from mm.registry import TOKENIZERS
from mm.specs import Encoded, FloatArray, ModalityTokenizer, Video, Waveform
from mm.tokenizers.load import fingerprint, load_tokenizer
from mm.vocabulary import RESERVED, extend_vocabulary

KINDS = list(TOKENIZERS)
EXACT = {"bpe", "hf", "bytes"}  # the others lose information, but not shape
# They give values in place of ids.
CONTINUOUS = {
    "array_patches",
    "image_patches",
    "image_processed",
    "mel_frames",
    "series_patches",
    "video_tubes",
    "whisper_mel",
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> ModalityTokenizer:
    return TOKENIZERS.get(kind).smallest_tokenizer()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def examples(kind: str) -> list[Any]:
    return TOKENIZERS.get(kind).examples()  # type: ignore[attr-defined]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Waveform):
        return a.sample_rate == b.sample_rate and np.array_equal(a.samples, b.samples)
    if isinstance(a, Video):
        return a.rate == b.rate and np.array_equal(a.frames, b.frames)
    if isinstance(a, FloatArray):
        return same(a.values, b.values)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def content(code: Encoded) -> np.ndarray:
    return code.ids if code.values is None else code.values


def of_ids(kind: str) -> None:
    if kind in CONTINUOUS:
        pytest.skip("law of ids: this tokenizer gives values")


def test_the_registry_has_all_modalities() -> None:
    assert {"bpe", "bytes", "image_vq", "audio_codec"} <= set(KINDS)


def test_values_are_as_promised(
    kind: str, tokenizer: ModalityTokenizer, examples: list[Any]
) -> None:
    spec = tokenizer.spec
    assert spec.continuous == (kind in CONTINUOUS) == (spec.n_ids == 0)
    for code in tokenizer.encode(examples) if spec.continuous else ():
        assert code.ids is None and code.values.dtype in (np.uint8, np.float16, np.float32)
        assert code.values.ndim == 1 + max(1, len(spec.grid or ()))
        assert code.values.shape[-1] == spec.n_features and code.values.size
        assert np.isfinite(code.values).all()


def test_ids_are_flat_int32_in_range(
    kind: str, tokenizer: ModalityTokenizer, examples: list[Any]
) -> None:
    of_ids(kind)
    codes = tokenizer.encode(examples)
    assert len(codes) == len(examples) >= 4
    for code in codes:
        assert code.ids.dtype == np.int32 and code.ids.ndim == 1
        assert len(code.ids) % tokenizer.spec.n_codebooks == 0
        assert ((code.ids >= 0) & (code.ids < tokenizer.spec.n_ids)).all()


def test_books_interleave_within_a_frame(
    kind: str, tokenizer: ModalityTokenizer, examples: list[Any]
) -> None:
    of_ids(kind)
    spec = tokenizer.spec
    for code in tokenizer.encode(examples):
        books = code.ids.reshape(-1, spec.n_codebooks) // spec.vocab_size
        assert (books == np.arange(spec.n_codebooks)).all()


def test_a_batch_equals_a_loop(tokenizer: ModalityTokenizer, examples: list[Any]) -> None:
    batch = tokenizer.encode(examples)
    loop = [tokenizer.encode([raw])[0] for raw in examples]
    for one, other in zip(batch, loop, strict=True):
        assert np.array_equal(content(one), content(other))
        assert dict(one.side) == dict(other.side)
    back = tokenizer.decode(batch)
    for one, code in zip(back, loop, strict=True):
        assert same(one, tokenizer.decode([code])[0])
    reverse = tokenizer.encode(examples[::-1])[::-1]
    assert all(np.array_equal(content(a), content(b)) for a, b in zip(batch, reverse, strict=True))


def test_round_trip(kind: str, tokenizer: ModalityTokenizer, examples: list[Any]) -> None:
    codes = tokenizer.encode(examples)
    back = tokenizer.decode(codes)
    assert len(back) == len(examples)
    for raw, out in zip(examples, back, strict=True):
        if kind in EXACT:
            assert out == raw
        elif isinstance(raw, Waveform):
            assert isinstance(out, Waveform)
            samples = np.asarray(out.samples)
            assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()
            seconds = len(raw.samples) / raw.sample_rate
            spare = 1.5 / out.sample_rate
            if kind in CONTINUOUS:  # up to a whole place
                spare += 1 / tokenizer.spec.tokens_per_second  # type: ignore[operator]
            assert abs(len(samples) / out.sample_rate - seconds) < spare
        elif kind == "series_patches":
            assert out.dtype == np.float32 and out.shape == raw.shape
            np.testing.assert_allclose(out, raw, rtol=1e-5, atol=1e-5)
        elif isinstance(raw, FloatArray):
            assert out.values.dtype == np.float32 and out.values.shape == raw.values.shape
            np.testing.assert_allclose(out.values, raw.values, rtol=1e-5, atol=1e-4)
        elif isinstance(raw, Video):
            assert out.frames.dtype == np.uint8 and out.frames.shape[3] == 3
            moment = tokenizer.spec.n_features / (3 * 4 * 4)  # frames of a tube
            assert abs(len(out.frames) / out.rate - len(raw.frames) / raw.rate) <= moment
        elif kind in CONTINUOUS:  # each its own shape
            assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3
        else:
            assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3
            assert out.shape == back[0].shape


def test_encoding_is_repeatable(tokenizer: ModalityTokenizer, examples: list[Any]) -> None:
    one, two = tokenizer.encode(examples), tokenizer.encode(examples)
    assert all(np.array_equal(content(a), content(b)) for a, b in zip(one, two, strict=True))


def test_nothing_in_gives_nothing(tokenizer: ModalityTokenizer) -> None:
    assert tokenizer.encode([]) == [] and tokenizer.decode([]) == []


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 1000])
def test_decode_takes_any_ids_in_range_of_any_length(
    kind: str, tokenizer: ModalityTokenizer, n: int
) -> None:
    of_ids(kind)
    rng = np.random.default_rng(n)
    for dtype in (np.int32, np.int64):
        ids = rng.integers(0, tokenizer.spec.n_ids, n).astype(dtype)
        (out,) = tokenizer.decode([Encoded(ids)])
        expected = {"bpe": str, "bytes": bytes, "image_vq": np.ndarray, "audio_codec": Waveform}
        if kind in expected:
            assert isinstance(out, expected[kind])


def test_saved_and_loaded_gives_the_same(
    tokenizer: ModalityTokenizer, examples: list[Any], tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "model")
    for path in (
        tmp_path / "model",
        tmp_path,
        str(tmp_path),
    ):  # its own folder, or the run folder around it
        loaded = load_tokenizer(path)
        assert loaded.spec == tokenizer.spec
    assert type(tokenizer).load(tmp_path / "model").spec == tokenizer.spec
    assert (
        len(tokenizer.spec.fingerprint) == 64
        and fingerprint(tmp_path / "model") == tokenizer.spec.fingerprint
    )
    for a, b in zip(tokenizer.encode(examples), loaded.encode(examples), strict=True):
        assert np.array_equal(content(a), content(b))
    assert not list((tmp_path / "model").glob("*.part"))
    again = tmp_path / "again"
    loaded.save(again)
    assert fingerprint(again) == tokenizer.spec.fingerprint


def test_every_single_change_changes_the_fingerprint(
    tokenizer: ModalityTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / HASHES).unlink()  # as folders were before they had hashes
    before = fingerprint(tmp_path)
    card = yaml.safe_load((tmp_path / "tokenizer.yaml").read_text())
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(card | {"modality": "other"}))
    assert fingerprint(tmp_path) != before
    with pytest.raises(UserError, match="fingerprint .* a file was changed or damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(card))
    assert fingerprint(tmp_path) == before
    weights = tmp_path / "model.safetensors"
    if weights.is_file():
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        name = next(n for n, t in tensors.items() if t.is_floating_point() and t.numel())
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, weights)
        assert fingerprint(tmp_path) != before
        with pytest.raises(UserError, match="fingerprint"):
            load_tokenizer(tmp_path)
    for data in (tmp_path / "tokenizer.json", tmp_path / "config.json"):
        if data.is_file():
            tokenizer.save(tmp_path)
            data.write_bytes(data.read_bytes() + b" ")
            with pytest.raises(UserError, match=f"{data.name}: changed or damaged"):
                load_tokenizer(tmp_path)
            (tmp_path / HASHES).unlink()
            with pytest.raises(UserError, match="fingerprint"):
                load_tokenizer(tmp_path)


def test_missing_and_damaged_folders_say_what_to_do(
    tokenizer: ModalityTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no tokenizer at .*mm tokenizer train"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer.save(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError):
            load_tokenizer(tmp_path)
        file.unlink()
        if file.name != HASHES:
            with pytest.raises(UserError):
                load_tokenizer(tmp_path)
        file.write_bytes(content)
    assert load_tokenizer(tmp_path).spec == tokenizer.spec


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    TOKENIZERS.get("bytes").smallest_tokenizer().save(tmp_path)  # type: ignore[attr-defined]
    card = yaml.safe_load((tmp_path / "tokenizer.yaml").read_text())
    from mm.tokenizers.load import fingerprint_of

    values = {**card, "kind": "byte"}
    values.pop("fingerprint")
    (tmp_path / "tokenizer.yaml").write_text(
        yaml.safe_dump(values | {"fingerprint": fingerprint_of(values)})
    )
    (tmp_path / HASHES).unlink()
    with pytest.raises(UserError, match="unknown tokenizer kind 'byte'; did you mean 'bytes'"):
        load_tokenizer(tmp_path)


def test_code_vectors_have_one_row_an_id(tokenizer: ModalityTokenizer) -> None:
    vectors = tokenizer.code_vectors()
    if vectors is not None:
        assert vectors.shape[0] == tokenizer.spec.n_ids and vectors.dtype == np.float32
        assert np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) > 1


def test_wrong_raw_values_are_refused_by_name(tokenizer: ModalityTokenizer) -> None:
    with pytest.raises(UserError):
        tokenizer.encode([object()])


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_text_never_becomes_a_control_token(kind: str) -> None:
    """Ids of text, shifted into the vocabulary, stay inside their range.

    The letters come back as letters.
    """
    tokenizer = TOKENIZERS.get(kind).smallest_tokenizer()  # type: ignore[attr-defined]
    hostile = ["<|image|>", "<|pad|><|null|><|document|>", "<s></s>[PAD]<|endoftext|><unk>"]
    vocabulary = extend_vocabulary([tokenizer.spec])
    place = vocabulary.range(tokenizer.spec.modality)
    for raw, code in zip(hostile, tokenizer.encode(hostile), strict=True):
        ids = code.ids + place.first
        assert len(ids) > 1
        assert ((ids >= place.first) & (ids < place.stop)).all() and ids.min() >= RESERVED
        back = tokenizer.decode([code])[0]
        assert (back if isinstance(back, str) else back.decode()) == raw


def test_the_same_network_has_the_same_fingerprint_in_any_process_precision() -> None:
    config = TOKENIZERS.get("image_vq")
    one, two = config.smallest_tokenizer(), config.smallest_tokenizer()  # type: ignore[attr-defined]
    assert one.spec.fingerprint == two.spec.fingerprint
    with torch.no_grad():
        next(two.net.parameters()).view(-1)[0] += 1e-4
    assert two.net.fingerprint(two.config) != one.spec.fingerprint


def test_patches_of_a_picture_that_fits_are_its_pixels() -> None:
    config = TOKENIZERS.get("image_patches")
    picture = np.random.default_rng(1).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    tokenizer = config(patch=4).build()  # type: ignore[call-arg]
    (code,) = tokenizer.encode([picture])
    assert code.values.shape == (2, 3, 48)
    assert np.array_equal(code.values[1, 2].reshape(4, 4, 3), picture[4:, 8:])
    assert np.array_equal(tokenizer.decode([code])[0], picture)
    large = np.zeros((400, 100, 3), np.uint8)
    assert (
        np.prod(config(patch=4, max_patches=64).build().encode([large])[0].values.shape[:2]) <= 64
    )  # type: ignore[call-arg]


def test_mel_frames_are_those_of_torchaudio() -> None:
    """The same filters and windows by another program; and a tone comes back at its height."""
    import torchaudio

    config = TOKENIZERS.get("mel_frames")
    tokenizer = config(n_mels=40).build()  # type: ignore[call-arg]
    t = np.arange(16000, dtype=np.float32) / 16000
    tone = Waveform((0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), 16000)
    (code,) = tokenizer.encode([tone])
    frames = code.values.astype(np.float32).reshape(-1, 40)
    oracle = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=400, hop_length=160, n_mels=40, power=1.0, center=True, pad_mode="constant"
    )(torch.from_numpy(tone.samples)[None])[0].T * (2 / 400)
    expected = 1 - oracle.clamp_min(1e-5).log().numpy() * (2 / np.log(1e-5))
    assert np.abs(frames[2:98] - expected[2:98]).max() < 2e-3
    (back,) = tokenizer.decode([code])
    spectrum = np.abs(np.fft.rfft(np.asarray(back.samples)[2000:14000]))
    assert abs(int(spectrum.argmax()) * 16000 / 12000 - 440) < 20
