"""`mm plan`: the command, its JSON, and what it proposes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm.cli.main import run as mm
from mm.trainer.data_sheets import like

CONFIG = "configs/quickstart/hybrid.yaml"
SMALL = ["model.backbone.depth=3", "callbacks=[]", "stages.0.data.batch_size=16"]
ASSUMED = ["--document", "60", "--ids", "500"]


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    given = ["--launches", "no", "--json", "-", *words]
    assert mm(["plan", CONFIG, *SMALL, *ASSUMED, *given]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_driver_s_name_is_one_of_the_data_sheets(name: str, known: str | None) -> None:
    found = like(name)
    assert (found and found.name) == known


def test_the_json_is_flat_and_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "--no-longest", "--nodes", "2")
    assert found["predicted"] is True and found["fits"] is True and found["gpus"] == 16
    parts = [v for k, v in found.items() if k.startswith("memory.by_part.")]
    assert found["memory.total_bytes"] == sum(parts) > 0  # type: ignore[arg-type]
    assert found["batch.assumed"] is True and found["batch.longest_document"] == 60
    assert all(f"errors.{name}" in found for name in ("memory", "collectives", "speed"))
    gpus = [row["gpus"] for row in found["by_nodes"]]  # type: ignore[attr-defined, union-attr]
    assert gpus == sorted(gpus) and gpus[0] == 8 and gpus[-1] >= 4096


def test_overrides_and_devices_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _json(capsys, "--no-longest")
    changed = ["--gpu", "l40s", "model.d_model=256", "engine.zero_stage=3"]
    wider = _json(capsys, "--no-longest", *changed)
    assert wider["parameters.total"] > 2 * plain["parameters.total"]  # type: ignore[operator]
    assert wider["zero_stage"] == 3 and "collectives.reduce_scatter" in wider
    assert wider["memory.device_bytes"] == 48e9 != plain["memory.device_bytes"]


@pytest.mark.slow
def test_a_proposal_is_words_that_the_config_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    words = ["plan", CONFIG, *SMALL, *ASSUMED, "--fit", "--no-longest", "--json", str(file)]
    assert mm(words) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured" in text and "known error of memory" in text
    assert "launches a layer, rg_lru + swiglu: " in text
    assert all(len(line) <= 80 for line in text.splitlines() if line[:1] in "┏┃┡│└")
    overrides = json.loads(file.read_text())["fit.overrides"]
    assert any(word.startswith("engine.zero_stage=") for word in overrides)
    again = _json(capsys, "--no-longest", *overrides)
    assert again["fits"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "--gpu h10: no such device; did you mean 'h100'?"),
        (["--stage", "4", *ASSUMED], "--stage 4: the config has stages 0 to 0"),
        ([], "to plan without the data: mm plan CONFIG --document TOKENS"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mm(["plan", CONFIG, "vocabulary=no/such/vocabulary.json", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_cpu_is_measured() -> None:
    from mm.plan.gpus import find

    cpu = find("cpu")
    assert cpu.measured and cpu.fp32 > 1e8 and cpu.bandwidth > 1e8 and cpu.memory > 0
