"""Commands on packed samples, configs and this machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_calls import said
from PIL import Image

from mm.cli import main as cli


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures, packed by the command."""
    home = tmp_path_factory.mktemp("cli")
    for i in range(12):
        folder = home / "files" / ("test" if i > 9 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(
            folder / f"{i:02d}.png"
        )
        (folder / f"{i:02d}.txt").write_text(f"picture [bold]{i}[/] of a small set of pictures")
    assert (
        cli.run(
            [
                "data",
                "pack",
                str(home / "files"),
                "--out",
                str(home / "shards"),
                "--json",
                str(home / "pack.json"),
            ]
        )
        == 0
    )
    return home


def test_pack_prints_what_its_json_holds(packed: Path) -> None:
    report = json.loads((packed / "pack.json").read_text())
    assert report["samples"] == {"train": 10, "test": 2} and report["quarantined"] == 0
    assert report["modalities"] == {"image": 12, "text": 12}


def test_inspect_shows_counts_and_a_sample(
    packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = said(
        capsys,
        "data",
        "inspect",
        str(packed / "shards"),
        "--json",
        str(tmp_path / "i.json"),
        "--out",
        str(tmp_path),
    )
    assert code == 0
    assert "picture [bold]0[/] of a small set" in out  # brackets of a caption are no markup
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["splits"]["train"]["modalities"]["image"]["count"] == 10
    with Image.open(found["examples"]["image"]["file"]) as image:
        assert image.size == (16, 16)


def test_verify_names_a_changed_byte(
    packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(packed / "shards", copy)
    assert said(capsys, "data", "verify", str(copy))[0] == 0
    shard = copy / "test" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(bytes(data))
    code, _, err = said(capsys, "data", "verify", str(copy), "--json", str(tmp_path / "v.json"))
    assert code == 2 and "shard-000000.tar" in err and "mm data pack" in err
    assert json.loads((tmp_path / "v.json").read_text())["ok"] is False


def test_tokenizer_train_eval_and_token_shards(
    packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "bpe.yaml"
    config.write_text("tokenizer: {kind: bpe, vocab_size: 300}\n")
    out = tmp_path / "tokenizers" / "text"
    assert (
        cli.run(
            [
                "tokenizer",
                "train",
                str(config),
                "tokenizer.vocab_size=280",
                "--data",
                str(packed / "shards"),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    code, shown, _ = said(
        capsys,
        "tokenizer",
        "eval",
        str(out),
        "--data",
        str(packed / "shards"),
        "--json",
        str(tmp_path / "e.json"),
    )
    figures = json.loads((tmp_path / "e.json").read_text())
    assert code == 0 and figures["vocab_size"] <= 280 and figures["items"] == 2
    assert figures["exact_round_trip_share"] == 1.0 and "bytes_per_token" in shown
    tokens = tmp_path / "tokens"
    assert (
        cli.run(
            [
                "data",
                "pack",
                str(packed / "shards"),
                "--tokenizers",
                str(tmp_path / "tokenizers"),
                "--out",
                str(tokens),
            ]
        )
        == 0
    )
    code, out_text, _ = said(
        capsys, "data", "inspect", str(tokens), "--tokenizers", str(tmp_path / "tokenizers")
    )
    assert code == 0 and "tokens" in out_text and "picture [bold]0[/]" in out_text
    code, _, err = said(
        capsys, "tokenizer", "eval", str(out), "--data", str(packed / "shards"), "--split", "tset"
    )
    assert code == 2 and "did you mean 'test'?" in err


def test_config_show_resolves_bases_and_overrides(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import yaml

    base = tmp_path / "base.yaml"
    base.write_text("tokenizer: {kind: bpe, vocab_size: 300}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntokenizer: {min_frequency: 7}\n")
    code, out, _ = said(
        capsys, "config", "show", str(tmp_path / "mine.yaml"), "--tokenizer.vocab_size", "400"
    )
    assert code == 0
    assert yaml.safe_load(out)["tokenizer"] == {
        "kind": "bpe",
        "modality": "text",
        "vocab_size": 400,
        "min_frequency": 7,
    }


def test_config_schema_holds_every_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mm.plug_point import Registry

    code, _, err = said(capsys, "config", "schema", "--out", str(tmp_path / "schema.json"))
    assert code == 0, err
    schema = json.loads((tmp_path / "schema.json").read_text())
    definitions = schema["$defs"]
    for registry in Registry.every.values():
        for kind in registry:
            entry = definitions[f"{registry.name}.{kind}"]
            assert entry["properties"]["kind"]["const"] == kind and "kind" in entry["required"]
            assert {"$ref": f"#/$defs/{registry.name}.{kind}"} in definitions[registry.name][
                "oneOf"
            ]
    run = definitions["Run"]["properties"]
    assert run["model"]["$ref"] == "#/$defs/network"
    assert definitions["Run"]["additionalProperties"] is False
    assert definitions["Run.Stage"]["properties"]["objective"]["$ref"] == "#/$defs/objective"
    # Every reference leads somewhere.
    text = json.dumps(schema)
    import re

    for reference in set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', text)):
        assert reference in definitions, reference


def test_doctor_finds_what_is_here_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = said(capsys, "doctor", "--json", str(tmp_path / "d.json"))
    rows = {row["check"]: row for row in json.loads((tmp_path / "d.json").read_text())}
    assert code == 0 and "torch" in rows and "cores" in rows and "disk" in rows
    assert any(name.startswith("kernel ") for name in rows) and "kernel attention" in out
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "webdataset":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "wandb" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("PATH", "")
    code, out, _ = said(capsys, "doctor", "--json", str(tmp_path / "d.json"))
    rows = {row["check"]: row for row in json.loads((tmp_path / "d.json").read_text())}
    assert code == 1
    assert (
        rows["webdataset"]["light"] == "broken"
        and 'pip install "webdataset' in rows["webdataset"]["mend"]
    )
    assert rows["wandb"]["light"] == "broken" and rows["wandb"]["found"].startswith("0.1")
    assert rows["C++ compiler"]["light"] == rows["threads"]["light"] == "warning"


def test_doctor_says_what_an_old_card_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mm.cli import this_machine

    cards = [SimpleNamespace(major=7, minor=5), SimpleNamespace(major=8, minor=9)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("Tesla T4", "NVIDIA L4")[i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    (found,) = [row for row in this_machine._torch() if row.check == "accelerator"]
    assert found.light == "warning" and "8.0" in found.mend
    assert found.found == ("Tesla T4 (compute capability 7.5), NVIDIA L4 (compute capability 8.9)")
    del cards[0]
    (found,) = [row for row in this_machine._torch() if row.check == "accelerator"]
    assert found.light == "ok" and not found.mend


def test_report_command(packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/text": 2.0}\n')
    code, out, _ = said(capsys, "report", str(tmp_path), "--json", str(tmp_path / "r.json"))
    page = Path(json.loads((tmp_path / "r.json").read_text())["report"])
    assert code == 0 and page.is_file() and str(page) in out.replace("\n", "")
