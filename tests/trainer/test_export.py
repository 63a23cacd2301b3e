"""The saved model of a run holds what generating needs, and nothing else."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
import trainer_toys as toys
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.decoders.folder import load
from mm.model.slices import Lazy
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.export import export
from mm.trainer.stage import make_module


def test_of_a_tokenizers_run_folder_the_tokenizer_alone_is_kept(tmp_path: Path) -> None:
    training = tmp_path / "tokenizer"
    BytesConfig(modality="text").build().save(training / "model")
    (training / "checkpoints").mkdir()
    (training / "checkpoints/large").write_bytes(b"x" * 1000)
    run = make_run(tmp_path, "one", model={"kind": "lm", "d_model": 16})
    run = run.model_copy(update={"tokenizers": {"text": training}})
    run.folder.mkdir(parents=True)
    vocabulary = toys.vocabulary()
    weights = make_module(run.model, vocabulary, 0, torch.device("cpu")).state_dict()
    export(run, vocabulary, weights, 1)
    loaded = load(run.folder)
    assert load_tokenizer(loaded.tokenizers["text"]).spec.modality == "text"
    kept = sorted(p.name for p in (run.folder / "model/tokenizers/text").iterdir())
    assert kept == ["hashes.json", "tokenizer.yaml"]


def test_the_saved_model_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one", model={"kind": "lm", "d_model": 16})
    run.folder.mkdir(parents=True)
    vocabulary = toys.vocabulary()
    weights = make_module(run.model, vocabulary, 0, torch.device("cpu")).state_dict()
    read: list[weakref.ref[torch.Tensor]] = []

    def one(name: str) -> torch.Tensor:
        assert all(before() is None for before in read), f"another tensor is there beside {name}"
        tensor = weights[name].clone()
        read.append(weakref.ref(tensor))
        return tensor

    export(run, vocabulary, Lazy({n: tuple(t.shape) for n, t in weights.items()}, one), 1)
    saved = load(run.folder).model.state_dict()
    assert len(read) == len(weights) and saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
