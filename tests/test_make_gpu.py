"""`make gpu`: what it does without a GPU, and its runner with parts that end, fail and hang."""

from __future__ import annotations

import ast
import gzip
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import ROOT
from source_tree import imports
from torch import Tensor

from mm.processes import is_alive

PARTS = """
import json, subprocess, sys, time
part, file = sys.argv[1:]
with open(file, "a") as out:
    out.write(json.dumps({"what": part, "ms": 1.5}) + "\\n")
if part == "attention":
    child = subprocess.Popen(["sleep", "60"])
    with open(file + ".pid", "w") as out:
        out.write(str(child.pid))
    time.sleep(60)
if part == "training":
    raise ValueError("does not fit")
"""

SMALL = (2, 32, 8, 50, 3)  # heads, width, states, classes, documents of the calls of ops


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
    pid = int((tmp_path / "attention.rows.pid").read_text())
    assert not is_alive(pid) or "zombie" in Path(f"/proc/{pid}/status").read_text()  # of nobody
    begun = (tmp_path / "ops.json").stat().st_mtime_ns
    assert gpu.run(["ops", "attention"], 1, False, tmp_path) == 0  # no time: nothing is begun
    assert (tmp_path / "ops.json").stat().st_mtime_ns == begun
    assert gpu.run(["training"], 60, False, tmp_path) == 1
    text = page.read_text()
    assert "failed with code 1" in text and "does not fit" in text
    assert text.index("## Every op and mixer") < text.index("## Attention") < text.index("## 300 M")


def test_the_parts_fit_into_nine_minutes(gpu: ModuleType) -> None:
    import gpu_parts  # pyright: ignore[reportMissingImports]

    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 540
    assert list(gpu.PARTS) == list(gpu_parts.RUN) == list(gpu_parts.DRY)


def test_every_implementation_of_an_op_is_compared(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong gradient, one that is not finite and one that raises are named; the rest go on."""
    import op_calls  # pyright: ignore[reportMissingImports]

    from mm.kernels.rms_norm import rms_norm

    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()
        return (y - 1.2 * weight + 1.2 * weight.detach()).to(x)

    def endless(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return wrong(x, weight, eps) * float("inf")

    def raises(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("out of shared memory")

    def right(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x)

    for one in (right, wrong, endless, raises):
        monkeypatch.setitem(rms_norm.implementations, one.__name__, (one, lambda *a: None))
    calls = op_calls.op_calls("cpu", SMALL)
    monkeypatch.setattr(op_calls, "op_calls", lambda *a: {"norm": calls["rms_norm"]})
    rows = list(op_calls.op_rows("cpu", SMALL, 64, 16))
    found = {(r["precision"], r["by"]): r for r in rows}
    for precision in ("fp32", "bf16"):
        assert found[precision, "right"]["state"] == "ok"
        assert found[precision, "right"]["results"] == 3  # an output, two gradients
        bad = found[precision, "wrong"]
        assert (bad["state"], bad["worst"]) == ("WRONG", "gradient of weight_D")
        assert found[precision, "endless"]["error"] == float("inf")
        assert found[precision, "raises"]["state"] == "RuntimeError: out of shared memory"


@pytest.mark.slow
def test_every_op_is_right_natively_here(gpu: ModuleType) -> None:
    """The part `ops` on the CPU, small; every op of mm.kernels is in it, in both precisions."""
    from gpu_page import import_kernels  # pyright: ignore[reportMissingImports]
    from op_calls import op_calls, op_rows  # pyright: ignore[reportMissingImports]

    from mm.kernels.op import Op

    import_kernels()
    rows = list(op_rows("cpu", SMALL, 64, 16))
    assert [row for row in rows if row["state"] != "ok"] == []
    ours = {name for name, op in Op.every.items() if op.__module__.startswith("mm.kernels.")}
    assert {op for op, _ in op_calls("cpu", SMALL).values()} == ours
    picked = [(row["op"], row["precision"]) for row in rows if row["picked"]]
    assert len(set(picked)) == len(picked) == 2 * len(op_calls("cpu", SMALL))


def test_every_figure_of_the_quickstart_stands_beside_its_bar(gpu: ModuleType) -> None:
    from gpu_runs import figures_of, steps_of  # pyright: ignore[reportMissingImports]

    figures = [
        {"name": "accuracy", "value": 0.98, "unit": "share", "chance": 0.1, "bar": 0.97},
        {"name": "recognised", "value": 0.9, "unit": "share", "bar": 0.95},
        {"name": "distance", "value": 0.36, "unit": "ratio", "bar": 0.5, "lower_is_better": True},
        {"name": "far", "value": 0.6, "unit": "ratio", "bar": 0.5, "lower_is_better": True},
        {"name": "bits", "value": 1.9, "unit": "bits", "n": 66},
        {"name": "bytes", "value": 2.4, "unit": "bytes", "bar": None},
        {"name": "lost", "value": None, "unit": "share", "bar": 0.5},
    ]
    rows = list(figures_of({"run": "runs/quickstart", "seed": 0, "figures": figures}))
    assert [(r["figure"], r["value"], r["bar"], r["met"]) for r in rows] == [
        ("accuracy", 0.98, "≥ 0.97", "yes"),
        ("recognised", 0.9, "≥ 0.95", "NO"),
        ("distance", 0.36, "≤ 0.5", "yes"),
        ("far", 0.6, "≤ 0.5", "NO"),
        ("bits", 1.9, "", ""),
        ("bytes", 2.4, "", ""),
        ("lost", None, "≥ 0.5", "NO"),
    ]
    alone, several = "mm train CONFIG", "torchrun --standalone --nproc_per_node=2 -m mm eval RUN"
    commands = [
        {"command": command, "seconds": 1.5}
        for command in ("mm data pack A", "mm tokenizer train B", alone, several, "mm report RUN")
    ]
    assert [row["figure"] for row in steps_of(commands)] == ["mm train", "mm eval"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_is_resumed_and_says_its_device(gpu: ModuleType) -> None:
    from gpu_runs import KILLS, resume  # pyright: ignore[reportMissingImports]

    name = next(iter(KILLS))  # two fewer starts
    (row,) = resume({name: KILLS[name]})
    assert (row["fault"], row["resumed"]) == (name, "same bits")
    assert row["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_a_step_leaves_its_trace(gpu: ModuleType, tmp_path: Path) -> None:
    from gpu_models import kernels_of, name_of  # pyright: ignore[reportMissingImports]

    x = torch.ones(8, 8)
    found = kernels_of(lambda: x @ x, tmp_path / "step.trace.json.gz")
    with gzip.open(tmp_path / "step.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert "aten::mm" in names and "aten::mm" in [e.key for e in found]
    assert name_of(ROOT / "build" / "gpu" / "a.gz") == "build/gpu/a.gz"


@pytest.mark.slow
def test_graphs_are_compared_with_eager_mode(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, compiled without Inductor; then with a compiled layer that is wrong."""
    import gpu_models  # pyright: ignore[reportMissingImports]

    from mm.plan.inputs import Assumed, open_subject
    from mm.trainer.stage import compile_blocks, make_module

    monkeypatch.setitem(gpu_models.SIZES, "tiny", (128, 1))
    monkeypatch.setattr(gpu_models, "TOKENS", 64)
    compiled, wrong = torch.nn.Module.compile, []
    run = gpu_models.run_of("tiny", "dense")
    subject = open_subject(run, 0, "autocast_bf16", Assumed(64, 300))

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        bent = lambda *given: tuple(x.cos() for x in graph.forward(*given))
        return bent if wrong else graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda s, **_: compiled(s, backend=backend))
    for said in ("ok: ", "WRONG: "):
        torch._dynamo.reset()
        module = make_module(run.model, subject.vocabulary, 0, torch.device("cpu"))
        compile_blocks(module, {"triton.cudagraphs": True})
        assert gpu_models.beside_eager(module, subject.batches(1)[0]).startswith(said)
        wrong.append(True)
    torch._dynamo.reset()


def test_differences_see_a_wrong_gradient(gpu: ModuleType) -> None:
    from gpu_parts import error_of  # pyright: ignore[reportMissingImports]

    right = torch.ones(4, dtype=torch.float64)
    assert error_of(right.float(), right) == 0
    assert error_of(1.1 * right, right) == pytest.approx(0.1)
    assert error_of(None, right) == float("inf")
    assert error_of(right.float() * float("nan"), right) == float("inf")


# ---- wheels ----


def test_the_wheels_are_those_of_the_project_and_of_what_the_parts_import(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_wheels  # pyright: ignore[reportMissingImports]
    from gpu_ops import PEERS  # pyright: ignore[reportMissingImports]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {*project["project"]["dependencies"], *project["build-system"]["requires"]}
    assert gpu_wheels.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert wanted <= set(listed)
    names = {re.split(r"[^\w-]", line)[0].lower() for line in listed}
    assert names == {re.split(r"[^\w-]", line)[0].lower() for line in wanted} | {"triton"}
    folder = ROOT / "benchmarks"
    own = {"mm", *PEERS, *(file.stem for file in folder.glob("*.py"))}
    for file in (*folder.glob("gpu*.py"), folder / "op_calls.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        roots = {name.partition(".")[0] for _, name in imports(tree)}
        assert roots - own - set(sys.stdlib_module_names) <= names, file.name


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("there", [False, True])
def test_make_gpu_installs_from_the_wheels_that_are_there(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl").write_text("")
    # under `make test` it would say which folder it leaves
    words = [
        "make",
        "--no-print-directory",
        "-n",
        "gpu",
        f"WHEELS={tmp_path}",
        f"VENV={tmp_path / 'venv'}",
    ]
    said = subprocess.check_output(words, cwd=ROOT, text=True)
    (line,) = (line for line in said.splitlines() if line.endswith("-e ."))
    assert (f'--no-index --find-links "{tmp_path}" -e .' in line) == there
    assert ("--no-index" in line) == there
    assert said.splitlines()[-1].split()[-1] == "benchmarks/gpu.py"
