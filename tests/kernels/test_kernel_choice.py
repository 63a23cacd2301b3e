"""Which implementation of an Op runs, and what is said about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mm.kernels import compiler, device
from mm.kernels.attention import attention
from mm.kernels.causal_conv import causal_conv
from mm.kernels.cross_entropy import linear_cross_entropy
from mm.kernels.glu import glu
from mm.kernels.linear_scan import linear_scan
from mm.kernels.op import KernelUnavailable, Op
from mm.kernels.rg_lru import rg_lru_gates
from mm.kernels.rms_norm import rms_norm

# ---- choosing an implementation ----


def test_the_choice_is_logged_once_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    @Op
    def doubled(x: int) -> int:
        return 2 * x

    @doubled.register("fast", lambda x: "x is odd" if x % 2 else None)
    def _(x: int) -> int:
        return x << 1

    with caplog.at_level("INFO", "mm.kernels"):
        assert [doubled(2), doubled(3), doubled(4), doubled(5)] == [4, 6, 8, 10]
    assert [r.getMessage() for r in caplog.records] == [
        "doubled: using fast",
        "doubled: using reference (fast: x is odd)",
    ]
    with pytest.raises(KernelUnavailable, match="doubled: fast: x is odd"), doubled.using("fast"):
        doubled(3)
    with pytest.raises(KernelUnavailable, match="no implementation 'slow'"), doubled.using("slow"):
        doubled(3)


def test_without_a_compiler_plain_pytorch_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    compiler.load.cache_clear()
    try:
        a, b = torch.rand(1, 3, 2), torch.randn(1, 3, 2)
        assert linear_scan.pick(a, b) == "loop"
        with (
            pytest.raises(KernelUnavailable, match="no C\\+\\+ compiler"),
            linear_scan.using("cpp"),
        ):
            linear_scan(a, b)
    finally:
        compiler.load.cache_clear()


def test_a_source_that_does_not_compile_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MM_KERNEL_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    library, reason = compiler.load(source)
    assert library is None
    if compiler.shutil.which("c++"):
        assert reason and "failed" in reason
    assert not list((tmp_path / "cache").glob("*")), "no half-made file stays"


def test_concurrent_processes_share_one_compiled_file(tmp_path: Path) -> None:
    if compiler.load(Path(linear_scan_source()))[0] is None:
        pytest.skip("needs a C++ compiler (install g++)")
    code = (
        "import json, torch; from mm.kernels.linear_scan import linear_scan\n"
        "a = torch.full((1, 3, 1), .5)\n"
        "with linear_scan.using('cpp'): print(json.dumps(linear_scan(a, a)[0].flatten().tolist()))"
    )
    env = {**os.environ, "MM_KERNEL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 0 and json.loads(out) == [0.5, 0.75, 0.875]
    assert len(list(tmp_path.iterdir())) == 1


def linear_scan_source() -> str:
    import mm.kernels.linear_scan as module

    return str(Path(module.__file__).with_name("scan.cpp"))


def test_every_op_documents_its_shapes() -> None:
    for op in (
        attention,
        causal_conv,
        glu,
        linear_scan,
        linear_cross_entropy,
        rg_lru_gates,
        rms_norm,
    ):
        assert (
            isinstance(op, Callable)
            and "Returns:" in (op.__doc__ or "")
            and "`(" in (op.__doc__ or "")
        )


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [(70, 80), (80, 80), (87, 80), (86, 86), (89, 86), (120, 86), (90, 90), (100, 100), (103, 100)],
)
def test_every_card_has_tiles(capability: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles in device.CARDS and device.card_like(capability) == tiles
    card = SimpleNamespace(major=capability // 10, minor=capability % 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert device.card() == tiles
    refused = device.why_not()
    if capability < 80:
        assert refused == "needs compute capability 8.0 or newer: this card has 7.0"
    else:
        assert refused is None or refused == "triton is not installed"
