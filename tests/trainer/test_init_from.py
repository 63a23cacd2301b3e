"""`init_from`: a new run begins with another one's weights, vocabulary and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from start_toys import files, image_tokenizer, packed, values
from trainer_runs import losses, torchrun

from mm.data.pack.job import pack
from mm.errors import UserError
from mm.init_from import InitFrom
from mm.model.folder import load_tensors
from mm.report.build import build_report
from mm.run import Run
from mm.tokenizers.image.vq import ImageVqConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.export import mark
from mm.trainer.loop import train
from mm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data and ``runs/base``, trained."""
    root = packed(tmp_path_factory.mktemp("init_from"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(Run.model_validate(values(root, root / "runs", "base", steps=3)))
    return root


def tuned(root: Path, out: Path, name: str = "tuned", **change: Any) -> Run:
    """A run that names neither vocabulary nor tokenizers."""
    made = values(root, out, name, **change) | {"init_from": str(root / "runs" / "base")}
    made["stages"][0]["optimizer"]["lr"] = 1e-9  # the weights stay
    return Run.model_validate(made | {"vocabulary": None, "tokenizers": {}})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "model" / "model.safetensors")


@pytest.mark.parametrize("exported", ["last", "best"])
def test_a_run_begins_with_the_weights_of_another(
    root: Path, tmp_path: Path, exported: str
) -> None:
    """Its resume does not read them again; both files say what it began with."""
    base = tmp_path / "base"
    shutil.copytree(root / "runs" / "base", base)
    run = tuned(root, tmp_path).model_copy(update={"init_from": InitFrom(path=base)})
    (base / "model.step").write_text(mark(run.model_copy(update={"export": exported}), 3))
    before = files(base)
    train(run)
    old, new = weights(base), weights(run.folder)
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["init_from"] == str(base)
    assert written["vocabulary"] == str(base / "model" / "vocabulary.json")
    assert sorted(written["tokenizers"]) == ["image", "text"]
    facts = json.loads((run.folder / "environment.json").read_text())["init_from"]
    assert facts["step"] == 3 and len(facts["sha256"]) == 64
    assert files(base) == before
    (base / "model" / "model.safetensors").unlink()
    longer = tuned(root, tmp_path, steps=4)
    longer = longer.model_copy(update={"init_from": InitFrom(path=base)})
    assert train(longer)["resumed_from"] == 2
    again = json.loads((run.folder / "environment.json").read_text())["init_from"]
    assert again == facts


def test_what_does_not_fit_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    def told(run: Run) -> str:
        with pytest.raises(UserError) as error:
            train(run)
        assert not (run.folder / "config.yaml").exists() or run.name == "base"
        return str(error.value)

    wide = tuned(root, tmp_path)
    wide = wide.model_copy(update={"model": wide.model.model_copy(update={"d_model": 32})})
    line = told(wide)
    assert "' is (64, 16) there and (64, 32) here" in line and "set model: as it is there" in line
    assert "init_from.allow_mismatched=[" in line
    deep = {"kind": "stack", "pattern": "2*attention", "mixers": {"attention": {"heads": 2}}}
    deep |= {"ffn": {"kind": "swiglu", "hidden": 32}}
    run = tuned(root, tmp_path, model={"kind": "lm", "d_model": 16, "backbone": deep})
    assert "has no 'backbone.layers.1." in told(run)
    gone = tuned(root, tmp_path)
    gone = gone.model_copy(update={"init_from": InitFrom(path=tmp_path / "gone")})
    assert "holds no saved model" in told(gone)
    itself = tuned(root, root / "runs", "base")
    assert "is the folder of this run itself" in told(itself)
    other = {"image": image_tokenizer(tmp_path / "image", 5), "text": root / "tokenizers" / "text"}
    pack(root / "data", tmp_path / "tokens", tokenizers=other, progress=False)
    made = tuned(root, tmp_path).model_copy(
        update={"vocabulary": tmp_path / "tokens" / "vocabulary.json", "tokenizers": other}
    )
    data = made.stages[0].data.model_copy(
        update={"sources": (made.stages[0].data.sources[0].model_copy(
            update={"path": tmp_path / "tokens"}),)}
    )  # fmt: skip
    stage = made.stages[0].model_copy(update={"data": data})
    assert "does not begin with that of" in told(made.model_copy(update={"stages": (stage,)}))


def test_new_modalities_begin_fresh_and_old_ids_stay(root: Path, tmp_path: Path) -> None:
    """The vocabulary is appended to: a tokenizer of bytes beside text and images."""
    new = tmp_path / "bytes"
    BytesConfig().build().save(new)
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(20):
        (raw / f"{i}.txt").write_text(f"plain words {i}")
    pack(raw, tmp_path / "data", progress=False)
    old = root / "runs" / "base" / "model" / "vocabulary.json"
    pack(
        tmp_path / "data",
        tmp_path / "tokens",
        tokenizers={"bytes": new},
        vocabulary=old,
        progress=False,
    )
    data = {"sources": [{"path": str(tmp_path / "tokens")}], "seq_len": 64}
    made = tuned(root, tmp_path, data=data).model_copy(
        update={
            "vocabulary": tmp_path / "tokens" / "vocabulary.json",
            "tokenizers": {"bytes": new},
        }
    )
    train(made)
    had, has = weights(root / "runs" / "base"), weights(made.folder)
    n = len(had["embedder.weight"])
    assert len(has["embedder.weight"]) == n + 258
    assert torch.allclose(has["embedder.weight"][:n], had["embedder.weight"], atol=1e-6)
    assert np.isfinite(has["embedder.weight"].numpy()).all()
    assert has["embedder.weight"][n:].std() > 0.05
    assert sorted(p.name for p in (made.folder / "model" / "tokenizers").iterdir()) == [
        "bytes",
        "image",
        "text",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_processes_begin_alike_at_every_zero_stage(
    root: Path, tmp_path: Path, zero: int
) -> None:
    """Losses are those of one process without ZeRO: all begin with the same weights."""
    one = tuned(root, tmp_path, "one", engine={"zero_stage": 0})
    two = tuned(root, tmp_path, f"two{zero}", engine={"zero_stage": zero})
    train(one)
    torchrun(2, [two])
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def named(run: Path) -> dict[str, Any]:
    return json.loads((run / "init_from.json").read_text())["model"]


def allowing(run: Run, root: Path, **keys: Any) -> Run:
    given = {"path": str(root / "runs" / "base"), **keys}
    return Run.model_validate(run.to_dict() | {"init_from": given})


def test_what_is_allowed_begins_fresh_and_is_told(root: Path, tmp_path: Path) -> None:
    """A deeper, and a wider model: what fits is taken, and every name is in the run's folder."""
    deep = {"kind": "stack", "pattern": "2*attention", "mixers": {"attention": {"heads": 2}}}
    deep |= {"ffn": {"kind": "swiglu", "hidden": 48}}
    run = tuned(root, tmp_path, model={"kind": "lm", "d_model": 16, "backbone": deep})
    with pytest.raises(UserError) as error:
        train(run)
    line = str(error.value)
    keys = dict(part.split("=") for part in line.partition("allow it: ")[2].split())
    assert keys["init_from.allow_missing"] == "[backbone.layers.1.*]"
    asked = [f"{key}={value}" for key, value in keys.items()]
    file = tmp_path / "run.yaml"
    values = run.to_dict() | {"init_from": str(root / "runs" / "base")}
    file.write_text(yaml.safe_dump(values))
    train(Run.load(file, asked))
    told, old, new = named(run.folder), weights(root / "runs" / "base"), weights(run.folder)
    assert set(told["taken"]) | set(told["new"]) == set(new) and told["left"] == []
    assert {n for n in told["new"] if ".layers.0." in n} == {
        "backbone.layers.0.ffn.gate_up.weight",
        "backbone.layers.0.ffn.out.weight",
    }
    assert all(torch.allclose(new[k], old[k], atol=1e-6) for k in told["taken"])
    page = build_report(run.folder).read_text()
    assert "Began with" in page and "backbone.layers.1.ffn.out.weight" in page
    fewer = tuned(root, tmp_path, "fewer")
    backbone = fewer.model.backbone.model_copy(update={"ffn": None})
    fewer = fewer.model_copy(
        update={"model": fewer.model.model_copy(update={"backbone": backbone})}
    )
    with pytest.raises(UserError, match=r"nothing takes its .*ffn.*allow_unexpected=\["):
        train(fewer)
    train(allowing(fewer, root, allow_unexpected=["*.ffn*"]))
    assert sorted(named(fewer.folder)["left"]) == sorted(k for k in old if ".ffn" in k)


def test_another_vocabulary_is_matched_by_modality(root: Path, tmp_path: Path) -> None:
    """Rows of the modality that both have are taken to where its ids stand now."""
    other = {"image": image_tokenizer(tmp_path / "image", 5), "text": root / "tokenizers" / "text"}
    first = tmp_path / "first"  # ids of images come first
    pack(root / "data", first, tokenizers={"image": other["image"]}, progress=False)
    tokens = tmp_path / "tokens"
    words = first / "vocabulary.json"
    pack(root / "data", tokens, tokenizers=other, vocabulary=words, progress=False)
    made = tuned(root, tmp_path, data={"sources": [{"path": str(tokens)}]})
    made = made.model_copy(update={"vocabulary": tokens / "vocabulary.json", "tokenizers": other})
    with pytest.raises(UserError, match=r"init_from\.vocabulary=matched"):
        train(made)
    train(allowing(made, root, vocabulary="matched"))
    old_words = Vocabulary.load(root / "runs" / "base" / "model" / "vocabulary.json")
    new_words = Vocabulary.load(tokens / "vocabulary.json")
    a, b = old_words.range("text"), new_words.range("text")
    assert a.begin != b.begin
    old, new = weights(root / "runs" / "base"), weights(made.folder)
    for table in ("embedder.weight", "heads.tokens.weight"):
        same = torch.allclose(new[table][b.begin : b.stop], old[table][a.begin : a.stop], atol=1e-6)
        assert same and named(made.folder)["partial"][table].endswith(f"{new_words.size:,} rows")
    own = old_words.range("image")
    assert not torch.allclose(
        new["heads.tokens.weight"][new_words.range("image").first],
        old["heads.tokens.weight"][own.first],
        atol=1e-3,
    )


def test_a_tokenizer_begins_with_a_saved_one(root: Path, tmp_path: Path) -> None:
    """From its folder, or the run that it was trained in; a language model does not fit it."""
    pack(root / "raw", tmp_path / "data", progress=False)

    def run(name: str, given: Path) -> Run:
        return Run.model_validate(
            {
                "name": name,
                "out": str(tmp_path),
                "init_from": str(given),
                "model": ImageVqConfig.smallest().to_dict(),
                "stages": [
                    {
                        "data": {"kind": "items", "path": str(tmp_path / "data"), "batch_size": 2}
                        | {"modality": "image"},
                        "objective": "vq",
                        "optimizer": {"kind": "adamw", "lr": 1e-9},
                        "budget": {"steps": 1},
                    }
                ],
            }
        )

    given = root / "tokenizers" / "image"
    train(run("tuned", given))
    old, new = load_tensors(given / "model.safetensors"), weights(tmp_path / "tuned")
    learned = [k for k in old if "quantizer" not in k]
    assert learned and all(torch.allclose(old[k], new[k], atol=1e-6) for k in learned)
    train(run("again", tmp_path / "tuned"))
    with pytest.raises(UserError, match=r"does not fit.*and \d+ more"):
        train(run("wrong", root / "runs" / "base"))


@pytest.mark.parametrize("linear", ["lora", "dora on nf4", "ternary"])
def test_a_dense_model_goes_on_with_other_linears(root: Path, tmp_path: Path, linear: str) -> None:
    """Adapters alone train, on weights that stay; the file of them and the base are the model."""
    forms = {
        "lora": {"kind": "lora", "rank": 2},
        "dora on nf4": {"kind": "lora", "base_layer": "nf4", "dora": True},
        "ternary": {"kind": "ternary"},
    }
    made = tuned(root, tmp_path, linear, steps=4, stage={"eval_every": 0})
    model = made.model.to_dict() | {"linear": forms[linear]}
    values = made.to_dict() | {"model": model, "checkpoints": {"every": 2, "keep_last": 9}}
    values["stages"][0]["optimizer"]["lr"] = 1e-2
    run = Run.model_validate(values)
    train(run)
    old, new, told = weights(root / "runs" / "base"), weights(run.folder), named(run.folder)
    shutil.copytree(run.folder, tmp_path / "again" / linear)
    for done in ("000004", "000003"):
        shutil.rmtree(tmp_path / "again" / linear / f"checkpoints/step_{done}", ignore_errors=True)
    assert train(run.model_copy(update={"out": tmp_path / "again"}))["resumed_from"] == 2
    again = weights(tmp_path / "again" / linear)
    assert all(torch.equal(new[k], again[k]) for k in new)
    if linear == "ternary":
        assert told["new"] == [] and not any(torch.equal(old[k], new[k]) for k in old)
        return
    adapters = load_tensors(run.folder / "adapters.safetensors")
    assert set(told["new"]) <= adapters.keys() and told["left"] == []
    stay = new.keys() - adapters.keys()
    for k in stay:
        same = old.get(k.replace(".base.weight", ".weight"))
        assert same is None or torch.equal(same, new[k]), k
    given = {"path": str(root / "runs" / "base"), "adapters": str(run.folder)}
    values = run.to_dict() | {"name": "put on", "init_from": given}
    values["stages"][0]["optimizer"] |= {"lr": 1e-12, "weight_decay": 0.0}
    put_on = Run.model_validate(values)
    train(put_on)
    found = weights(put_on.folder)
    assert all(
        torch.allclose(found[k], new[k], atol=1e-7) for k in new if new[k].is_floating_point()
    )
    with pytest.raises(UserError, match=r"adapters: .* has no adapters\.safetensors"):
        train(
            Run.model_validate(values | {"name": "x", "init_from": given | {"adapters": str(root)}})
        )


def test_operations_stand_in_the_yaml(root: Path, tmp_path: Path) -> None:
    """A deeper model begins where the old one ended; one that does not fit says what it is."""
    run = tuned(root, tmp_path, stage={"eval_every": 2})
    values = run.to_dict() | {
        "init_from": {"path": str(root / "runs" / "base"), "surgery": [{"kind": "deepen"}]}
    }
    with pytest.raises(UserError, match=r"after the surgery backbone\.pattern is attention att"):
        train(Run.model_validate(values))
    values["model"]["backbone"]["pattern"] = "2*attention"
    values["stages"][0]["optimizer"] |= {"lr": 1e-12, "weight_decay": 0.0}
    deep = Run.model_validate(values)
    train(deep)
    plain = tuned(root, tmp_path, "plain").to_dict()
    plain["stages"][0]["optimizer"] |= {"lr": 1e-12, "weight_decay": 0.0}
    train(Run.model_validate(plain))
    assert losses(deep) == pytest.approx(losses(Run.model_validate(plain)), rel=1e-5)
    wrong = values | {"name": "wrong", "init_from": values["init_from"] | {
        "surgery": ["deepen", {"kind": "keep_layers", "layers": [7]}]}}  # fmt: skip
    with pytest.raises(UserError, match=r"^init_from\.surgery\.1: surgery 'keep_layers'"):
        train(Run.model_validate(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["dora", "dora on nf4", "ternary"])
def test_linears_are_alike_at_every_zero_stage(
    root: Path, tmp_path: Path, linear: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where ZeRO-3 has the base's matrix in its own forward alone."""
    forms: dict[str, Any] = {
        "dora": {"kind": "lora", "dora": True, "dropout": 0.1},
        "dora on nf4": {"kind": "lora", "base_layer": "nf4", "dora": True},
        "ternary": {"kind": "ternary"},
    }
    found = []
    for zero in (0, 1, 3):
        made = values(root, tmp_path, f"zero{zero}", steps=3)
        made["engine"]["zero_stage"] = zero
        made["model"]["linear"] = forms[linear]
        train(run := Run.model_validate(made))
        found.append(losses(run))
    assert ("nothing was learnt by: set init_from" in caplog.text) == (linear != "ternary")
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)
