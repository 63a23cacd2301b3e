"""Large models in several files: every reader takes them, and an index that lies is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, save_model
from safetensors.torch import load_file, save_file

from mm.cli import main as cli
from mm.decoders.folder import load
from mm.errors import UserError
from mm.init_from import InitFrom
from mm.model import folder as files
from mm.model import weight_files
from mm.model.layer import init_weights
from mm.model.model import Model
from mm.model.tensor_file import PIECE
from mm.plan.tally import Measure
from mm.registry import NETWORKS
from mm.report.find import n_parameters
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.warm_start import WarmStart

INDEX, MOST = weight_files.INDEX, 20_000
Values = dict[str, Any]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tied model in one file and in several."""
    root = tmp_path_factory.mktemp("weights")
    tied = {"tokens": {"kind": "softmax", "tied": True}}
    model: Any = NETWORKS.parse({"kind": "lm", "d_model": 32, "heads": tied}).build(VOCABULARY)
    init_weights(model, 3)
    model.save_pretrained(root / "one")
    own = model.state_dict(keep_vars=True)
    files.save_model(root / "many", model.config.to_dict(), own, VOCABULARY, {}, most=MOST)
    return root


def test_several_files_are_the_model_that_one_file_is(given: Path) -> None:
    one, many = given / "one", given / "many"
    found = sorted(p.name for p in many.glob("*.safetensors*"))
    assert found[-1] == INDEX and len(found) > 3 and not (one / INDEX).exists()
    assert all(
        path.stat().st_size < MOST + 4000 or len(load_file(path)) == 1
        for path in weight_files.weight_files(many)
    )
    places = json.loads((many / INDEX).read_text())
    assert places["metadata"]["aliases"] == {"heads.tokens.weight": "embedder.weight"}
    a, b = files.load_tensors(one), files.load_tensors(many)
    assert a.keys() == b.keys() and all(torch.equal(a[n], t) for n, t in b.items())
    loaded = Model.from_pretrained(many)
    assert loaded.heads["tokens"].weight is loaded.embedder.weight
    assert n_parameters(one / weight_files.ONE) == n_parameters(many / weight_files.ONE)
    assert n_parameters(many / INDEX) == sum(t.numel() for t in loaded.parameters())
    assert weight_files.digest_weights(many) != weight_files.digest_weights(one)


def test_every_reader_takes_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mm generate` and `average`, `init_from` and its surgery; what they write is cut as well."""
    monkeypatch.setattr(weight_files, "MOST", 4000)
    run = save_model(tmp_path / "run", text=BytesConfig(modality="text"))
    assert (run / "model" / INDEX).is_file() and load(run).vocabulary.modalities
    words = ["--to", "text", "-p", "ab", "--max-tokens", "3", "--out", str(tmp_path / "said")]
    assert cli.run(["generate", str(run), *words]) == 0
    assert cli.run(["average", str(run), str(run), "--out", str(tmp_path / "mean")]) == 0
    assert (tmp_path / "mean" / INDEX).is_file()
    old, mean = (files.load_tensors(f) for f in (run / "model", tmp_path / "mean"))
    assert all(torch.equal(t, mean[n]) for n, t in old.items())
    words_of = files.Vocabulary.load(run / "model/vocabulary.json")
    twice = InitFrom(path=run, surgery=[{"kind": "deepen"}])  # type: ignore[list-item]
    for asked in (InitFrom(path=run), twice):
        warm = WarmStart("init_from", asked, words_of)
        assert warm.facts["sha256"] == weight_files.digest_weights(run / "model")
        assert torch.equal(warm.tensors("model")["embedder.weight"], old["embedder.weight"])
    capsys.readouterr()


def test_a_write_holds_one_tensor(given: Path, tmp_path: Path) -> None:
    """Read from several files and written to several, whatever the model's size."""
    config = {"kind": "lm", "d_model": 128, "backbone": {"kind": "stack", "depth": 10}}
    model: Any = NETWORKS.parse(config).build(VOCABULARY)
    init_weights(model, 0)
    save = lambda to, given: files.save_model(
        to, model.config.to_dict(), given, VOCABULARY, {}, most=2**18
    )
    save(tmp_path / "a", model.state_dict())
    size = sum(p.numel() * 4 for p in model.parameters())
    most = max(p.numel() * 4 for p in model.parameters())
    del model.backbone
    with Measure() as found:
        before = found.live.now
        save(tmp_path / "b", files.open_tensors(tmp_path / "a"))
    assert size > 8 * most and most < 4 * PIECE
    assert most <= found.live.peak - before <= 2 * most + 2**16, "it, and its piece"
    a, b = (files.load_tensors(tmp_path / name) for name in "ab")
    assert all(torch.equal(t, b[n]) for n, t in a.items())


def edit(folder: Path, change: Callable[[Values], Any]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values)
    (folder / INDEX).write_text(json.dumps(values))


def twice(folder: Path) -> None:
    first, second, *_ = weight_files.weight_files(folder)
    save_file(load_file(second) | load_file(first), second)


def place(name: str) -> Callable[[Path], None]:
    return lambda d: edit(d, lambda v: v["weight_map"].update({"embedder.weight": name}))


ALIASES: Values = {"metadata": {"aliases": {"heads.tokens.weight": "embedder.bias"}}}
STORED: Values = {"metadata": {"aliases": {"embedder.weight": "backbone.norm.weight"}}}
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "out of the folder": (place("../x.safetensors"), "'../x.safetensors' is no file of this"),
    "absolute": (place("/etc/passwd"), "'/etc/passwd' is no file of this folder"),
    "below": (place("a/x.safetensors"), "no file of this folder"),
    "hidden": (place(".x.safetensors"), "no file of this folder"),
    "no name": (place(""), "no file of this folder"),
    "zero byte": (place("a\0.safetensors"), "no file of this folder"),
    "no text": (place([1]), "no file of this folder"),  # type: ignore[arg-type]
    "not there": (place("model-9.safetensors"), "model-9.safetensors: is missing"),
    "missing file": (
        lambda d: weight_files.weight_files(d)[1].unlink(),
        r"model-00002-of-\d+\.safetensors: is missing, model.safetensors.index.json names it",
    ),
    "half a file": (
        lambda d: weight_files.weight_files(d)[1].write_bytes(b"x" * 99),
        r"model-00002-of-\d+\.safetensors: damaged",
    ),
    "in two files": (twice, r"model-00002-.*: holds '.*', as model-00001-of-.* does"),
    "not in its file": (
        lambda d: edit(d, lambda v: v["weight_map"].update(x=v["weight_map"]["embedder.weight"])),
        r"holds no 'x', model.safetensors.index.json says so",
    ),
    "not named": (
        lambda d: edit(d, lambda v: v["weight_map"].pop("backbone.norm.weight")),
        "index.json: does not name backbone.norm.weight",
    ),
    "an alias of nothing": (lambda d: edit(d, lambda v: v.update(ALIASES)), "aliases name no"),
    "an alias of a stored one": (lambda d: edit(d, lambda v: v.update(STORED)), "aliases name no"),
    "no map": (lambda d: edit(d, lambda v: v.update(weight_map=[])), "weight_map is no mapping"),
    "no object": (lambda d: (d / INDEX).write_text("[]"), "index.json: damaged"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), "index.json: damaged"),
    "nothing": (lambda d: (d / INDEX).unlink(), "no weights at .*model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_that_lies_is_one_line(fault: str, given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "many", tmp_path / "m")
    damage, why = FAULTS[fault]
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=why) as caught:
        files.open_tensors(tmp_path / "m")
    assert "\n" not in str(caught.value)
