"""`make gpu`: what it does without a GPU, and its runner with parts that end, fail and hang."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from laws import ROOT

PARTS = """
import json, sys, time
part, file = sys.argv[1:]
with open(file, "a") as out:
    out.write(json.dumps({"what": part, "ms": 1.5}) + "\\n")
if part == "attention":
    time.sleep(60)
if part == "training":
    raise ValueError("does not fit")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu  # pyright: ignore[reportMissingImports]

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_builds_and_nothing_is_written(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_models  # pyright: ignore[reportMissingImports]

    before = gpu.RESULTS.is_file() and gpu.RESULTS.read_bytes()
    monkeypatch.setattr(gpu_models, "SIZES", {"300M": (256, 4), "1B": (512, 4)})
    assert gpu.main([]) == 0
    said = capsys.readouterr().out
    assert "no GPU here" in said and "DOES NOT BUILD" not in said
    for part, (what, _) in gpu.PARTS.items():
        assert f"{part}: {what}" in said
    assert "SDPA cuDNN" in said and "FlexAttention" in said
    assert "dense: 3 reads of the device in 3 steps" in said
    assert "hybrid: 3 reads of the device in 3 steps" in said
    assert "predicted on an H100" in said and "kill -9" in said
    assert before == (gpu.RESULTS.is_file() and gpu.RESULTS.read_bytes())


def test_a_part_that_does_not_build_fails(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_parts  # pyright: ignore[reportMissingImports]

    def broken() -> list[str]:
        raise ImportError("no such kernel")

    monkeypatch.setitem(gpu_parts.DRY, "ops", broken)
    assert gpu.dry_run(["ops", "resume"]) == 1
    said = capsys.readouterr().out
    assert "DOES NOT BUILD: ImportError: no such kernel" in said and "kill -9" in said


def test_parts_are_cut_off_and_gone_on_with(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, page = tmp_path / "parts.py", tmp_path / "results.md"
    script.write_text(PARTS)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu, "RESULTS", page)
    monkeypatch.setattr(gpu, "LEAST", 2)
    monkeypatch.setitem(gpu.PARTS, "attention", ("attention", 4))
    assert gpu.run(["ops", "attention"], 60, False, tmp_path) == 0
    states = {p: json.loads((tmp_path / f"{p}.json").read_text()) for p in ("ops", "attention")}
    assert states["ops"]["state"] == "done"
    assert states["attention"]["state"] == "cut off"
    assert states["attention"]["rows"] == [{"what": "attention", "ms": 1.5}]  # kept
    assert "| attention | 1.5 |" in page.read_text()
    begun = (tmp_path / "ops.json").stat().st_mtime_ns
    assert gpu.run(["ops", "attention"], 1, False, tmp_path) == 0  # no time: nothing is begun
    assert (tmp_path / "ops.json").stat().st_mtime_ns == begun
    assert gpu.run(["training"], 60, False, tmp_path) == 1
    text = page.read_text()
    assert "failed with code 1" in text and "does not fit" in text
    assert text.index("## Every mixer") < text.index("## Attention") < text.index("## 300 M")


def test_the_parts_fit_into_nine_minutes(gpu: ModuleType) -> None:
    import gpu_parts  # pyright: ignore[reportMissingImports]

    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 540
    assert list(gpu.PARTS) == list(gpu_parts.RUN) == list(gpu_parts.DRY)


def test_differences_see_a_wrong_gradient(gpu: ModuleType) -> None:
    from gpu_parts import error_of  # pyright: ignore[reportMissingImports]

    right = torch.ones(4, dtype=torch.float64)
    assert error_of(right.float(), right) == 0
    assert error_of(1.1 * right, right) == pytest.approx(0.1)
    assert error_of(None, right) == float("inf")
    assert error_of(right.float() * float("nan"), right) == float("inf")
