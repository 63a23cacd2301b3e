"""Models, prompts and run folders of strangers in `mm generate`: one line, exit code 2.

Ids begin with the numbers of the cases in the trial that found them; `tests/test_hostile_cases.py`
lists where each is.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from generation_toys import save_model
from safetensors.torch import load_file, save_file

from mm.cli import main as cli
from mm.data.modalities.audio import resample
from mm.data.modalities.base import BadSample
from mm.decoders.raws import expected_tokens
from mm.hashes import write_hashes
from mm.specs import TokenSpec, Waveform
from mm.tokenizers.text.bpe import BpeConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.checkpoint.save import Moment, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("saved"),
        text=BpeConfig(vocab_size=260),
        image=BytesConfig(modality="image"),
        audio=BytesConfig(modality="audio"),
    )


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run `mm generate` of ``words``, which must end with code 2 and one short last line."""
    code = cli.run(["generate", *map(str, words)])
    err = capsys.readouterr().err
    assert code == 2, err
    assert len(err) < 3000 and "for the traceback" not in err, err
    return err


TEXT = ("--to", "text", "-p", "the digit", "--max-tokens", "2")
# id -> (words, what is said)
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "603 a prompt of 1 MB": (("-p", "x " * 60_000), "--max-prompt-tokens"),
    "604 a prompt of one letter": (("-p", "a" * 100_000), "--max-prompt-tokens"),
    "610 temperature inf": (("--temperature", "inf"), "temperature must be"),
    "611 temperature 1e-320": (("--temperature", "1e-320"), "temperature must be"),
    "temperature nan": (("--temperature", "nan"), "--temperature"),
    "top_p nan": (("--top-p", "nan"), "--top-p"),
    "top_p 0": (("--top-p", "0"), "top_p must be"),
    "cfg_scale inf": (("--cfg-scale", "inf"), "cfg_scale must be"),
    "cfg_scale nan": (("--cfg-scale", "nan"), "cfg_scale must be"),
    "622 n 10**9": (("-n", "1000000000"), "-n"),
    "624 max-tokens 10**12": (("--max-tokens", str(10**12)), "--max-tokens"),
    "625 max-tokens 10**30": (("--max-tokens", str(10**30)), "--max-tokens"),
    "seed 2**70": (("--seed", str(2**70)), "--seed"),
    "631 out /": (("-o", "/"), "/"),
    "632 an ending of nothing": (("--to", "audio", "-o", "x.evil"), ".evil"),
    "633 out below a file": (("-o", "/etc/passwd/x.txt"), "/etc/passwd"),
    "634 out in /proc": (("-o", "/proc/x.txt"), "/proc/x"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_work_is_refused(
    saved: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, says = OPTIONS[case]
    assert says in refuse(capsys, saved, *TEXT, *words)


def test_546_ids_of_a_tokenizer_beyond_its_vocabulary_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "tokenizers/text/tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] = {word: i + 2**31 for word, i in raw["model"]["vocab"].items()}
    path.write_text(json.dumps(raw))
    write_hashes(run / "tokenizers/text")
    shutil.rmtree(run / "model/tokenizers/text")
    shutil.copytree(run / "tokenizers/text", run / "model/tokenizers/text")
    write_hashes(run / "model")
    assert "tokenizer" in refuse(capsys, run, *TEXT)


@pytest.mark.parametrize("seconds", [1500])
def test_643_minutes_of_audio_are_refused_before_they_are_encoded(
    saved: Path, tmp_path: Path, seconds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(seconds * 1000, np.float32), 1000)
    line = refuse(capsys, saved, "--to", "text", "--audio", tmp_path / "a.wav")
    assert "--max-prompt-tokens" in line


def test_644_a_rate_whose_filter_would_take_gigabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="convert the file first: sox"):
        resample(Waveform(np.zeros(1000, np.float32), 767_999), 16_000)
    for rate in (8000, 11_025, 22_050, 44_100, 48_000, 96_000):
        assert resample(Waveform(np.zeros(rate, np.float32), rate), 16_000).sample_rate == 16_000


def test_the_limit_of_a_prompt_is_raised_by_its_key(saved: Path) -> None:
    words = ("generate", str(saved), "--to", "text", "-p", "a b c d e f", "--max-tokens", "1")
    assert cli.run([*words, "--max-prompt-tokens", "3"]) == 2
    assert cli.run([*words, "--max-prompt-tokens", "300"]) == 0


def integers(value: Any, n: int) -> Any:
    """A JSON tree with every integer set to ``n``."""
    if isinstance(value, dict):
        return {key: integers(item, n) for key, item in value.items()}
    if isinstance(value, list):
        return [integers(item, n) for item in value]
    return n if isinstance(value, int) and not isinstance(value, bool) else value


def config(model: Path, change: Callable[[Any], Any]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def aliases(model: Path, text: str) -> None:
    path = model / "model.safetensors"
    save_file(load_file(path), path, metadata={"aliases": text})


def depth(values: Any) -> Any:
    values["backbone"]["depth"] = 10**7
    return values


MODELS: dict[str, Callable[[Path], Any]] = {
    "573 aliases name nothing": lambda m: aliases(m, '{"x": "no_such"}'),
    "575 aliases a list": lambda m: aliases(m, "[1]"),
    "576 every integer 10**9": lambda m: config(m, lambda v: integers(v, 10**9)),
    "577 every integer 10**11": lambda m: config(m, lambda v: integers(v, 10**11)),
    "581 depth 10**7": lambda m: config(m, depth),
    "584 config a list": lambda m: config(m, lambda v: []),
    "585 config null": lambda m: config(m, lambda v: None),
    "586 config nested": lambda m: (m / "config.json").write_text("[" * 10_000),
    "593 vocabulary binary": lambda m: (m / "vocabulary.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_saved_model_that_lies_is_refused(
    run: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the right hashes beside it, as somebody would who wants it to be read."""
    MODELS[case](run / "model")
    write_hashes(run / "model")
    assert str(run / "model") in refuse(capsys, run, *TEXT)


RESULTS: dict[str, str] = {
    "597 strings": '{"sampling": {"image_to_text": {"temperature": "x", "top_k": "y"}}}',
    "598 a list": '{"sampling": []}',
    "599 an entry null": '{"sampling": {"image_to_text": null}}',
    "600 NaN": '{"sampling": {"image_to_text": {"temperature": NaN}}}',
    "601 nested": "[" * 10_000,
    "half a top_k": '{"sampling": {"image_to_text": {"top_k": 1.5}}}',
}


@pytest.mark.parametrize("case", RESULTS)
def test_settings_of_an_evaluation_that_lie_are_refused_by_file(
    run: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "results.json").write_text(RESULTS[case])
    (run / "a.png").write_bytes(b"x")
    line = refuse(capsys, run, "--to", "text", "--image", run / "a.png", "--max-tokens", "2")
    assert "results.json" in line


@pytest.fixture
def unfinished(run: Path) -> Path:
    """A run folder without a saved model: one checkpoint, the config that it was made with."""
    tensors = load_file(run / "model/model.safetensors")
    save(run / "checkpoints", Moment.of({"step": 1}, {"model": tensors}), keep_last=1)
    values = json.loads((run / "model/config.json").read_text())
    shutil.move(run / "model/vocabulary.json", run / "vocabulary.json")
    shutil.rmtree(run / "model")
    named = {name: str(run / "tokenizers" / name) for name in ("text", "image", "audio")}
    whole = {"vocabulary": str(run / "vocabulary.json"), "model": values, "tokenizers": named}
    (run / "config.yaml").write_text(json.dumps(whole))
    return run


def rewrite(**change: Any) -> Callable[[Path], Any]:
    def apply(run: Path) -> None:
        values = json.loads((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(json.dumps(values | change))

    return apply


def text(words: bytes, name: str = "config.yaml") -> Callable[[Path], Any]:
    return lambda run: (run / name).write_bytes(words)


MARK = "checkpoints/step_000001/COMPLETE"
RUNS: dict[str, Callable[[Path], Any]] = {
    "695 imports missing": rewrite(imports=["no_such_x"]),
    "696 imports a number": rewrite(imports=7),
    "697 model null": rewrite(model=None),
    "698 tokenizers a list": rewrite(tokenizers=[]),
    "699 broken YAML": text(b"a: [\n"),
    "700 a list": text(b"[]"),
    "701 not UTF-8": text(b"\xff\xfe\x00"),
    "702 mark not JSON": text(b"{x", MARK),
    "703 mark a list": text(b"[]", MARK),
    "mark nested": text(b"[" * 10_000, MARK),
}


def test_an_unfinished_run_generates(unfinished: Path) -> None:
    assert cli.run(["generate", str(unfinished), *TEXT]) == 0


@pytest.mark.parametrize("case", RUNS)
def test_a_run_folder_that_lies_is_refused(
    unfinished: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RUNS[case](unfinished)
    assert str(unfinished) in refuse(capsys, unfinished, *TEXT)


def test_a_header_of_100_gigabytes_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "model/model.safetensors").write_bytes(struct.pack("<Q", 10**11) + b"{}")
    write_hashes(run / "model")
    assert "model.safetensors" in refuse(capsys, run, *TEXT)


def test_a_prompt_is_not_echoed_in_a_line_of_a_fault(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """603: the command to repeat was 120 kB long."""
    monkeypatch.setattr("mm.decoders.generate.load", lambda *a: 1 / 0)
    assert cli.run(["generate", str(saved), "--to", "text", "-p", "y" * 120_000]) == 1
    assert len(capsys.readouterr().err) < 1000


def test_the_ids_of_a_recording_are_known_by_its_seconds() -> None:
    spec = TokenSpec("audio", 8, tokens_per_second=75.0, fingerprint="a")
    assert expected_tokens(spec, Waveform(np.zeros(16_000, np.float32), 8000)) == 150
    assert expected_tokens(spec, b"bytes") == 0
