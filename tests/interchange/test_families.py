"""Every family: in, logits as in `transformers`, out again, the same tensors bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_checkpoints import CASES, checkpoint
from safetensors.torch import load_file
from thinned import every
from torch import Tensor

from mm.errors import UserError
from mm.interchange.check import STEPS, TOLERANCE
from mm.interchange.read import import_model
from mm.interchange.write import export_model
from mm.model import weight_files
from mm.model.folder import load_tensors, save_tensors
from mm.model.model import Model
from mm.registry import FAMILIES


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_every_family_has_a_case() -> None:
    with_pictures = {"llava"}  # tests/interchange/test_llava.py
    assert {family for family, _, _ in CASES.values()} | with_pictures == {*FAMILIES}


@pytest.mark.parametrize("case", every(3, CASES))
def test_in_and_out(case: str, tmp_path: Path) -> None:
    given, ours, back = checkpoint(tmp_path / "given", case), tmp_path / "ours", tmp_path / "back"
    report = import_model(given, ours)
    assert report is not None and report.difference <= TOLERANCE and report.continued == 2 * STEPS
    assert report.spread > 0.1, "logits near zero would agree with anything"
    again = export_model(ours, back, most=40_000)
    assert again is not None and again.difference <= TOLERANCE
    before, after = tensors_of(given), tensors_of(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert len(list(back.glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (given / name).read_bytes() == (back / name).read_bytes()
    config = json.loads((back / "config.json").read_text())
    first = json.loads((given / "config.json").read_text())
    assert config["model_type"] == CASES[case][0], "a Mistral without windows is no Llama"
    assert config.get("max_position_embeddings") == first.get("max_position_embeddings")
    third = tmp_path / "third"
    import_model(back, third, check=False)
    one, two = load_tensors(ours), load_tensors(third)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_an_older_olmo3_scales_rotations_of_layers_that_see_all(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "given", "olmo3, windows and rotations by layer")
    file = given / "config.json"
    config = json.loads(file.read_text())
    full = config.pop("rope_parameters")["full_attention"]
    config["rope_theta"] = 500000.0
    config["rope_scaling"] = {k: v for k, v in full.items() if k != "rope_theta"}
    file.write_text(json.dumps(config))
    report = import_model(given, tmp_path / "ours")
    assert report is not None and report.difference <= TOLERANCE
    mixers = json.loads((tmp_path / "ours" / "config.json").read_text())["backbone"]["mixers"]
    scaled = {word: mixer["position"]["scaling"] is not None for word, mixer in mixers.items()}
    assert scaled["attention"] and not scaled["sliding"]


def test_half_precision_stays_as_it_is_in_one_file_and_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MOST", 20_000)
    given = checkpoint(tmp_path / "given")
    for file in given.glob("*.safetensors"):
        save_tensors(file, {n: t.bfloat16() for n, t in load_file(file).items()})
    import_model(given, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    assert all((tmp_path / name / weight_files.INDEX).is_file() for name in ("ours", "back"))
    before, after = tensors_of(given), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {t.dtype for t in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
def test_rows_that_training_moved_go_to_the_ids_of_begin_and_end(case: str, tmp_path: Path) -> None:
    import_model(checkpoint(tmp_path / "given", case), tmp_path / "ours", check=False)
    model = Model.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        for weight in {model.embedder.weight, model.heads["tokens"].weight}:
            weight[16:18] += torch.randn_like(weight[16:18])
    tokenizers = {"text": tmp_path / "ours" / "tokenizers" / "text"}
    model.save_pretrained(tmp_path / "tuned", tokenizers=tokenizers)
    export_model(tmp_path / "tuned", tmp_path / "back")
    after, own = tensors_of(tmp_path / "back"), model.state_dict()
    table = after["transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"]
    head = after.get("lm_head.weight", table)
    assert torch.equal(head[4], own["heads.tokens.weight"][17])
    if case == "llama":
        assert torch.equal(table[3], own["embedder.weight"][16])


def test_a_wrong_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.interchange.families.llama import Llama

    monkeypatch.setattr(Llama, "eps", 1e-2)
    given = checkpoint(tmp_path / "given")
    config = json.loads((given / "config.json").read_text())
    del config["rms_norm_eps"]  # 1e-6 to transformers
    (given / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="logits differ"):
        import_model(given, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".ours*"))
