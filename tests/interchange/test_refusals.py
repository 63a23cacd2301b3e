"""Checkpoints that are damaged, hostile or not understood: one line each, nothing written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checkpoints import checkpoint
from safetensors.torch import load_file, save_file

from mm.errors import UserError
from mm.interchange.read import import_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("refusals") / "given")


def config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def index(folder: Path, name: str, file: str) -> None:
    values = json.loads((folder / INDEX).read_text())
    values["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(values))


def pickled(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def one_file(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def lying(folder: Path) -> None:
    file = first(folder)
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 4096
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def cut(folder: Path) -> None:
    first(folder).write_bytes(first(folder).read_bytes()[:-100])


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (pickled, "pytorch_model.bin: a pickle can run code"),
    "lying header": (lying, "damaged or no safetensors"),
    "cut off": (cut, "damaged or no safetensors"),
    "a huge header": (
        lambda d: first(d).write_bytes(b"\xff" * 8 + b"{}"),
        "damaged or no safetensors",
    ),
    "a file is missing": (lambda d: first(d).unlink(), "is missing, model.safetensors.index"),
    "the index leads out": (lambda d: index(d, NORM, "../x.safetensors"), "is no file of this"),
    "the index lies": (lambda d: index(d, "model.more", first(d).name), "holds no 'model.more'"),
    "no index": (lambda d: (d / INDEX).unlink(), "holds no weights"),
    "a key is missing": (lambda d: one_file(d, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "a key too many": (
        lambda d: one_file(d, lambda t: t.update({"model.extra": torch.ones(2)})),
        "holds what no layer takes: model.extra",
    ),
    "another shape": (
        lambda d: one_file(d, lambda t: t.update({NORM: torch.ones(41)})),
        "backbone.norm.weight: .41. where the config asks for .40.",
    ),
    "another vocabulary": (lambda d: config(d, vocab_size=400), "is .320, 40., config.json says"),
    "eight bits": (
        lambda d: one_file(d, lambda t: t.update({NORM: torch.ones(40).to(torch.int8)})),
        "model.norm.weight holds I8, quantised",
    ),
    "unknown family": (lambda d: config(d, model_type="llamma"), "is none of: gemma2"),
    "no family": (lambda d: config(d, model_type=None), "is none of"),
    "unknown activation": (lambda d: config(d, hidden_act="relu6"), "hidden_act = 'relu6'"),
    "rotations by another rule": (
        lambda d: config(d, rope_parameters={"rope_type": "proportional", "factor": 2.0}),
        "scales rotations by 'proportional'",
    ),
    "no number": (lambda d: config(d, num_attention_heads="4"), "num_attention_heads = '4'"),
    "no width": (lambda d: config(d, hidden_size=-1), "hidden_size = '-1'"),
    "quantised": (lambda d: config(d, quantization_config={"bits": 4}), "are quantised"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json; write it"),
    "no tokens": (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    "half a config": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_named_and_nothing_written(fault: str, whole: Path, tmp_path: Path) -> None:
    import shutil

    given = tmp_path / "given"
    shutil.copytree(whole, given)
    damage, why = FAULTS[fault]
    damage(given)
    with pytest.raises(UserError, match=why) as caught:
        import_model(given, tmp_path / "ours", check=False)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["given"]
