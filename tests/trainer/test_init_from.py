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
from mm.model.folder import load_tensors
from mm.run import Run
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.export import mark
from mm.trainer.loop import train


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
    run = tuned(root, tmp_path).model_copy(update={"init_from": base})
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
    longer = tuned(root, tmp_path, steps=4).model_copy(update={"init_from": base})
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
    assert "' is (64, 16) there and " in line and "init_from takes a model of the same" in line
    deep = {"kind": "stack", "pattern": "2*attention", "mixers": {"attention": {"heads": 2}}}
    deep |= {"ffn": {"kind": "swiglu", "hidden": 32}}
    run = tuned(root, tmp_path, model={"kind": "lm", "d_model": 16, "backbone": deep})
    assert "has no 'backbone.layers.1." in told(run)
    gone = tuned(root, tmp_path).model_copy(update={"init_from": tmp_path / "gone"})
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
