"""Weights of four bits multiplied by bitsandbytes: its codes, its products, and where it runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from start_toys import packed, values
from torch import Tensor

from mm.kernels.op import KernelUnavailable
from mm.model.folder import load_tensors
from mm.model.layer import init_weights
from mm.model.linears import nf4
from mm.model.linears.lora import Lora, LoraConfig
from mm.model.linears.nf4 import Nf4, Nf4Config, nf4_linear
from mm.run import Run
from mm.trainer.loop import train

# The dev extra has it: CI fails without it.
installed = pytest.mark.skipif(
    nf4.MISSING is not None and "CI" not in os.environ, reason=f"bitsandbytes: {nf4.MISSING}"
)
doubles = pytest.mark.parametrize("double", [False, True])


def matrix(d_out: int, d_in: int, double: bool) -> tuple[Tensor, Nf4]:
    """A matrix of rows of unlike sizes, and it in four bits."""
    g = torch.Generator().manual_seed(d_out + d_in)
    weight = torch.randn(d_out, d_in, generator=g) * torch.linspace(0.01, 3, d_out)[:, None]
    part = Nf4(d_in, d_out, double=double)
    part._set(weight)
    return weight, part


@installed
@pytest.mark.slow  # importing it takes seconds
@doubles
@pytest.mark.parametrize("shape", [(96, 256), (33, 192), (1, 64)])
def test_codes_and_scales_are_theirs(double: bool, shape: tuple[int, int]) -> None:
    """Of the same weights; theirs decode to ours. Scales of scales are e4m3 here, and no worse."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, part = matrix(*shape, double)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    assert torch.equal(part.codes[: -(-weight.numel() // 2)], codes.flatten())
    theirs = dequantize_4bit(codes, state)
    if not double:
        assert torch.equal(part.scales.view(torch.float32), state.absmax)
        assert torch.equal(part.matrix(), theirs)
        return
    _, single = matrix(*shape, False)
    off = lambda found: float((found - single.matrix()).norm() / weight.norm())
    assert off(part.matrix()) <= max(0.02, 1.05 * off(theirs))


@installed
@pytest.mark.slow  # importing it takes seconds
@doubles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_the_references(
    double: bool, dtype: torch.dtype, autocast: bool
) -> None:
    """Of a linear of LoRA upon it: of what it reads and of both adapters."""
    part = LoraConfig(base_layer=Nf4Config(double=double)).build(192, 80)
    init_weights(part)
    assert isinstance(part, Lora)
    torch.nn.init.normal_(part.lora_b)
    part = part.to(dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 192, generator=g).to(dtype).requires_grad_()

    def results(name: str) -> list[Tensor]:
        with nf4_linear.using(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = part(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, [x, part.lora_a, part.lora_b], dy)]

    rounding = 1e-6 if dtype == torch.float32 and not autocast else 1e-2
    for ours, theirs in zip(results("reference"), results("bitsandbytes"), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= rounding * ours.float().norm()


@installed
@pytest.mark.slow  # importing it takes seconds
@doubles
def test_what_is_exported_is_the_same_matrix(double: bool) -> None:
    """`merge_lora`, which `mm export` goes through, and DoRA's lengths of rows."""
    part = LoraConfig(base_layer=Nf4Config(double=double), dora=True).build(192, 80)
    init_weights(part)
    assert isinstance(part, Lora)
    torch.nn.init.normal_(part.lora_b)
    whole = part.dense_weight()
    with nf4_linear.using("bitsandbytes"):
        torch.testing.assert_close(part.dense_weight(), whole, rtol=1e-6, atol=1e-6)
        x = torch.randn(5, 192)
        torch.testing.assert_close(part(x), x @ whole.T, rtol=1e-5, atol=1e-5)


@installed
@pytest.mark.slow  # importing it takes seconds
def test_a_step_keeps_four_bits_and_no_matrix() -> None:
    _, part = matrix(128, 256, True)
    x = torch.randn(3, 256, requires_grad=True)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        nf4_linear.using("bitsandbytes"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
    ):
        part(x)
    assert sum(kept.values()) < 0.52 * 256 * 128  # bytes


@installed
def test_it_runs_where_it_is_right_and_wanted() -> None:
    """On a CPU by name alone, and never where 0.50.2 is wrong: rows of no whole blocks."""
    _, part = matrix(768, 48, False)
    tensors = (part.codes, part.scales, part.outer, part.shape)
    x = torch.randn(2, 48)
    assert nf4_linear.pick(x, *tensors) == "reference"
    with nf4_linear.using("bitsandbytes"), pytest.raises(KernelUnavailable, match="rows of 48"):
        part(x)
    _, part = matrix(96, 128, True)
    tensors, x = (part.codes, part.scales, part.outer, part.shape), torch.randn(2, 128)
    why = nf4_linear.implementations["bitsandbytes"][1](x, *tensors)
    assert why == "on a CPU taken by name alone: MM_NF4_LINEAR=bitsandbytes"
    assert nf4_linear.pick(x, *tensors) == "reference"
    with nf4_linear.using("bitsandbytes"):
        assert nf4_linear.pick(x, *tensors) == "bitsandbytes"
        with pytest.raises(KernelUnavailable, match="no torch.float64"):
            part(x.double())
    with torch.device("meta"):
        nowhere = Nf4(128, 96)
        assert nf4_linear.pick(x.to("meta"), nowhere.codes, nowhere.scales, None, (96, 128)) == (
            "reference"
        )


def test_asked_for_and_absent_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nf4, "MISSING", "it is not installed: pip install 'mm-stack[bitsandbytes]'")
    line = r"^MM_NF4_LINEAR=bitsandbytes: it is not installed: pip install 'mm-stack\[bits.*\]'$"
    with nf4_linear.using("bitsandbytes"), pytest.raises(KernelUnavailable, match=line):
        Nf4(64, 64)
    x, (_, part) = torch.randn(2, 64), matrix(8, 64, False)
    assert nf4_linear.pick(x, part.codes, part.scales, None, part.shape) == "reference"


ALONE = """
import sys
asked, reads = [], []
class Hub:
    def get_kernel(self, name, **_): asked.append(name)
hub = sys.modules["kernels"] = Hub()
from mm.model.linears.nf4 import Nf4
Nf4(64, 64)
assert "bitsandbytes" in sys.modules, "imported with the first matrix"
assert sys.modules["kernels"] is hub and asked == [], asked
"""


@installed
@pytest.mark.slow
def test_it_is_imported_with_the_model_and_fetches_nothing() -> None:
    """Its CPU backend asks the package `kernels` for code of a hub where that is installed."""
    environment = {**os.environ, "MM_NF4_LINEAR": "bitsandbytes"}
    made = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0 and "kernels-community" not in made.stderr, made.stderr


@installed
@pytest.mark.slow
def test_a_run_resumes_and_its_model_is_any_implementations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps and two more are four, bit by bit; the file is the same one that ours reads."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = packed(tmp_path)

    def run(name: str, steps: int) -> Run:
        made = values(root, root / "runs", name, steps=steps)
        made["model"] |= {"d_model": 64, "linear": {"kind": "lora", "base_layer": "nf4"}}
        made["model"]["backbone"]["ffn"]["hidden"] = 64
        made["checkpoints"] = {"every": 2, "keep_last": 9}
        return Run.model_validate(made)

    with nf4_linear.using("bitsandbytes"):
        train(whole := run("whole", 4))
        train(again := run("again", 2))
        train(again := run("again", 4))
    one, two = (load_tensors(r.folder / "model/model.safetensors") for r in (whole, again))
    assert all(torch.equal(one[k], two[k]) for k in one) and one.keys() == two.keys()
    train(ours := run("ours", 4))
    other = load_tensors(ours.folder / "model/model.safetensors")
    assert one.keys() == other.keys()
    off = max(float((one[k].float() - other[k].float()).abs().max()) for k in one)
    assert off < 1e-5 and not math.isnan(off)
