"""What a caller gives and gets: files, arrays, bytes, words, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_toys import png, wav
from generation_toys import save_model
from PIL import Image
from rich.control import strip_control_codes

from mm import generate
from mm.cli import generate as command
from mm.cli import main as cli
from mm.data.modalities.base import get_modality
from mm.decoders.generate import Generator
from mm.decoders.raws import by_reader, own_modality, read_raw, writable_modalities
from mm.errors import UserError
from mm.specs import TokenSpec, Waveform
from mm.tokenizers.text.bpe import BpeConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.tokenizers.text.words import MOST, Words


@pytest.fixture(scope="module")
def any_to_any(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text by BPE, pictures and sounds as the bytes of their files."""
    return save_model(
        tmp_path_factory.mktemp("any"),
        text=BpeConfig(vocab_size=260),
        image=BytesConfig(modality="image"),
        audio=BytesConfig(modality="audio"),
    )


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bytes"), bytes=BytesConfig())


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.run(["generate", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_of_bytes_is_prompted_like_one_of_text(
    of_bytes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (of_bytes, "--prompt", "ROMEO:", "--max-tokens", "4", "--seed", "2")
    code, out, err = said(capsys, *words)
    assert code == 0 and out.startswith("ROMEO:") and len(out) > 7, err
    for to in ("text", "bytes"):
        assert said(capsys, *words, "--to", to)[1] == out
    assert said(capsys, *words, "-o", tmp_path / "more.md")[0] == 0
    assert (tmp_path / "more.md").read_bytes().startswith(b"ROMEO:")
    settings = {"max_tokens": 4, "seed": 2}
    assert generate(of_bytes, "ROMEO:", to="bytes", **settings).startswith(b"ROMEO:")
    text = generate(of_bytes, "ROMEO:", to="text", **settings)
    assert strip_control_codes(text) + "\n" == out, "a terminal is rung by nobody's model"


def test_pictures_and_sounds_are_given_by_name(any_to_any: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.wav").write_bytes(wav())
    model = Generator.from_pretrained(any_to_any)
    settings = {"to": "text", "max_tokens": 5, "seed": 2}
    one = generate(model, image=tmp_path / "a.png", **settings)
    assert isinstance(one, str) and one == generate(
        model, image=str(tmp_path / "a.png"), **settings
    )
    assert one == generate(model, {"image": png()}, **settings)
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert generate(model, image=pixels, **settings) == generate(
        model, image=Image.fromarray(pixels), **settings
    )
    sound = (np.zeros(50), 8000)
    wave = Waveform(np.zeros(50, np.float32), 8000)
    both = generate(model, "the digit", image=pixels, audio=sound, **settings)
    assert both == generate(
        model, {"text": "the digit", "image": pixels, "audio": wave}, **settings
    )
    assert isinstance(generate(model, "seven", to="image", max_tokens=5), bytes)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image": "no.png"}, "image no.png: no such file"),
        ({"image": np.zeros((4, 4, 3))}, r"expected uint8 \(H, W, 3\), found float64"),
        ({"audio": np.zeros(50)}, r"\(samples, sample rate in Hz\)"),
        ({"audio": (np.zeros((2, 50)), 8000)}, "mono"),
        ({"audio": (np.array([0.0, np.nan]), 8000)}, "not finite"),
        ({"image": b"no picture"}, "unreadable header"),
        ({"prompt": {"text": "a"}, "text": "b"}, "'text' is given twice"),
        ({"prompt": [{"text": "a"}], "image": "b"}, "beside a list of prompts"),
        ({"imag": "a.png"}, "no setting or modality 'imag'; did you mean 'image'"),
        ({"to": "vidio"}, "the model knows no modality 'vidio'"),
        ({"to": None}, "say which modality to generate; this model has: text, image, audio"),
    ],
)
def test_what_cannot_be_given_is_named(any_to_any: Path, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(any_to_any, **{"to": "text", "max_tokens": 2, **given})


def test_files_go_in_and_come_out_as_they_are(any_to_any: Path, tmp_path: Path) -> None:
    """Not decoded and written again: a JPEG's ids are those of the JPEG."""
    model = Generator.from_pretrained(any_to_any)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "a.jpg")
    jpeg = (tmp_path / "a.jpg").read_bytes()
    (ids,) = model.encode("image", [tmp_path / "a.jpg"])
    assert ids.tobytes() == np.frombuffer(jpeg, np.uint8).astype(np.int32).tobytes()
    (again,) = model.decode("image", [ids])
    image = get_modality("image")
    assert again == jpeg
    assert image.write(again, tmp_path / "b").read_bytes() == jpeg
    assert image.write(again, tmp_path / "b").suffix == ".jpg"
    assert image.write(b"noise", tmp_path / "c").name == "c.bin"
    assert "cannot be read" in image.view(b"noise") and image.view(jpeg).shape == (4, 4, 3)
    assert read_raw("image", tmp_path / "a.jpg").shape == (4, 4, 3)  # without a tokenizer of bytes


def test_an_ending_of_another_modality_is_refused_before_anything_is_made(
    any_to_any: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (any_to_any, "--prompt", "seven", "--max-tokens", "3")
    for to, name, mend in (
        ("image", "x.mp3", "x.png"),
        ("image", "x.foo", "x.png"),
        ("audio", "x.png", "x.wav"),
        ("text", "x.png", "x.txt"),
    ):
        code, _, err = said(capsys, *words, "--to", to, "-o", tmp_path / name)
        assert code == 2 and f"write -o {tmp_path / mend}" in err and err.count("\n") == 1
    code, out, err = said(capsys, *words, "--to", "image", "-o", tmp_path / "y.png")
    assert code == 0 and "bytes that" in out and (tmp_path / "y.png").stat().st_size <= 3, err


def test_what_to_generate_is_asked_for(
    any_to_any: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (any_to_any, "--prompt", "seven", "--max-tokens", "3")
    code, _, err = said(capsys, *words)
    assert code == 2 and err == "mm: --to is missing: --to text or --to image or --to audio\n"
    monkeypatch.setattr(command, "at_terminal", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr("typer.prompt", lambda question: asked.append(question) or "text")
    code, out, _ = said(capsys, *words)
    assert code == 0 and "seven" in out and "(text, image, audio)" in asked[0]
    code, _, err = said(capsys, any_to_any, "--to", "text", "--max-tokens", "3")
    assert code == 0 and err == "no prompt: text as the model makes it without a condition\n"


def test_words_never_seen_are_named(
    any_to_any: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    generate(any_to_any, "The digit SEVEN, 7", to="text", max_tokens=8)
    assert not caplog.text
    generate(any_to_any, "a photo of the cat, a cat", to="text", max_tokens=30)
    assert "'a', 'photo', 'of', 'cat'; the model" in caplog.text


def test_words_are_known_up_to_a_number_and_in_scripts_that_space_them() -> None:
    words = Words(["the"])
    assert words.unseen("The THE theirs 漢字 don\u2019t 12") == ["theirs", "don't"]
    assert list(words.watch(f"w{'abcdefghij'[i % 10]}{'x' * (i // 10)}" for i in range(30)))
    assert len(words.known or ()) == 31
    letters = "abcdefghijklmnopqrstuvwxyz"
    many = (a + b + c + d for a in letters for b in letters for c in letters for d in letters[:4])
    assert sum(1 for _ in words.watch(many)) == 26**3 * 4 > MOST
    assert words.known is None and words.unseen("anything") == [] and words.files() == {}


def test_a_raw_name_means_the_only_modality_made_of_it() -> None:
    assert own_modality("text", ["image", "bytes"]) == "bytes"
    assert own_modality("text", ["text", "bytes"]) == "text"
    with pytest.raises(UserError, match="knows no modality 'audio'; known: bytes, image"):
        own_modality("audio", ["image", "bytes"])


def test_of_codes_and_values_of_pictures_the_values_are_read() -> None:
    text, codes = TokenSpec("text", 10), TokenSpec("image", 240, grid=(8, 8))
    values = TokenSpec("pixels", 0, grid=(4, 4), continuous=True, n_features=12)
    assert by_reader({"text": "a", "image": 1}, (text, codes, values)) == {"text": "a", "pixels": 1}
    assert by_reader({"image": 1}, (text, values)) == {"pixels": 1}
    assert by_reader({"image": 1}, (text, codes)) == {"image": 1}
    both = {"image": 1, "pixels": 2}  # each by its own name
    assert by_reader(both, (text, codes, values)) == both
    alone = values._replace(modality="image")
    assert by_reader({"image": 1}, (text, alone)) == {"image": 1}
    tokenizers = dict.fromkeys(("text", "image", "pixels"))
    assert writable_modalities((text, codes, values), tokenizers) == ["text", "image"]
    assert writable_modalities((text, codes, values), {"pixels": None, "text": None}) == ["text"]
