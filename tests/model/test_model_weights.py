"""A model's weights: tied, seeded, saved, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_toys import VOCABULARY, ids, make

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.model import Model


def test_a_tied_head_shares_the_very_parameter_everywhere(tmp_path: Path) -> None:
    model = make(heads={"tokens": {"kind": "softmax", "tied": True}})
    assert model.heads["tokens"].weight is model.embedder.weight
    assert model.to(torch.float64).heads["tokens"].weight is model.embedder.weight
    model(Batch.of_ids(ids(1, 4))).heads["tokens"].nll.sum().backward()
    both = model.embedder.weight.grad.clone()
    untied = make().double()
    untied.load_state_dict(model.state_dict())
    untied(Batch.of_ids(ids(1, 4))).heads["tokens"].nll.sum().backward()
    torch.testing.assert_close(
        both, untied.embedder.weight.grad + untied.heads["tokens"].weight.grad
    )
    model.float().save_pretrained(tmp_path / "m")
    loaded = Model.from_pretrained(tmp_path / "m")
    assert loaded.heads["tokens"].weight is loaded.embedder.weight
    from safetensors import safe_open

    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert "heads.tokens.weight" not in file.keys() and "embedder.weight" in file.keys()


def test_code_vectors_seed_their_rows_and_no_others() -> None:
    model = make()
    before = model.embedder.weight.detach().clone()
    vectors = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    vectors[1] = vectors[0]  # alike
    model.config.prepare(model, {"image": vectors})
    after = model.embedder.weight.detach()
    r = VOCABULARY.range("image")
    assert torch.equal(after[: r.first], before[: r.first]) and torch.equal(
        after[r.stop :], before[r.stop :]
    )
    rows = torch.nn.functional.normalize(after[r.first : r.stop], dim=1)
    alike = rows @ rows.T
    assert alike[0, 1] > 0.5 and alike[0, 1] < 0.999, (
        "alike codes begin alike, but can be told apart"
    )
    assert alike[0, 1] > alike[0, 2:].max()
    assert abs(after[r.first : r.stop].std() * 4 - 1) < 0.35
    again = make()
    again.config.prepare(again, {"image": vectors})
    assert torch.equal(again.embedder.weight, after), "a fixed projection: all ranks and runs alike"
    off = make(code_init=False)
    off.config.prepare(off, {"image": vectors})
    assert torch.equal(off.embedder.weight, before)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_used_inside_their_own_module_s_forward_only(tied: bool) -> None:
    """What ZeRO-3 does: outside the forward of the module that owns it, a parameter is empty."""
    model = make(
        heads={"tokens": {"kind": "softmax", "tied": tied}},
        adapters={"image": {"kind": "linear", "d_in": 3}},
        backbone={"kind": "stack", "pattern": "rg_lru attention"},
    )
    batch = Batch.of_ids(ids(2, 5), Layout.from_rows([[Doc(5, slot=0)], [Doc(5, slot=1)]]))
    expected = model(batch).heads["tokens"].nll.detach()
    whole = {id(p): p.data for p in model.parameters()}

    def gather(module: torch.nn.Module, *_: object) -> None:
        for p in module.parameters(recurse=False):
            p.data = whole[id(p)]

    def release(module: torch.nn.Module, *_: object) -> None:
        for p in module.parameters(recurse=False):
            p.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        assert torch.equal(model(batch).heads["tokens"].nll, expected)
        served = model(batch, state=model.initial_state(2, 8)).heads["tokens"].nll
        torch.testing.assert_close(served, expected)


def test_a_saved_model_is_complete_and_computes_the_same(tmp_path: Path) -> None:
    model = make(backbone={"kind": "stack", "pattern": "rg_lru local_attention", "depth": 4})
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.yaml").write_text("kind: bytes\n")
    for _ in range(2):  # the second replaces the first
        model.save_pretrained(tmp_path / "out" / "m", tokenizers={"text": tmp_path / "tok"})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m"], (
        "no temporary folder stays"
    )
    assert (tmp_path / "out" / "m" / "tokenizers" / "text" / "tokenizer.yaml").is_file()
    loaded = Model.from_pretrained(tmp_path / "out" / "m")
    assert loaded.vocabulary == VOCABULARY and loaded.config == model.config and not loaded.training
    batch = Batch.of_ids(ids(2, 7))
    assert torch.equal(loaded(batch).hidden, model.eval()(batch).hidden)


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "m")
    old = (tmp_path / "m" / "config.json").read_text()
    with pytest.raises(FileNotFoundError):
        model.save_pretrained(tmp_path / "m", tokenizers={"text": tmp_path / "missing"})
    assert (tmp_path / "m" / "config.json").read_text() == old and len(
        list(tmp_path.iterdir())
    ) == 1


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no saved model"):
        Model.from_pretrained(tmp_path)
    model = make()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(UserError, match="damaged"):
        Model.from_pretrained(tmp_path / "m")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "hashes.json").unlink()
    config["backbone"]["depth"] = 3
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing backbone.layers.2"):
        Model.from_pretrained(tmp_path / "m")
    config["kind"] = "image_vq"
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a language model"):
        Model.from_pretrained(tmp_path / "m")
