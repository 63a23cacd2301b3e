"""`mm bench mixers` at tiny lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mm.bench import mixers as bench
from mm.cli import main as cli
from mm.kernels.linear_scan import linear_scan

KEYS = "mixer linear length tokens_per_second peak_mib growth_exponent decode_us state_bytes note"


@pytest.mark.slow
def test_the_command_writes_rows_and_a_picture_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "mixers", "--only", "rg_lru", "--lengths", "8,16"]
    words += ["--d-model", "16", "--json", str(tmp_path / "b.json")]
    for _ in range(2):
        assert cli.run([*words, "--plot", str(tmp_path / "b.png")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert all(" ".join(row) == KEYS for row in rows)
    assert [(r["mixer"], r["length"]) for r in rows] == [("rg_lru", 8), ("rg_lru", 16)]
    for row in rows:
        layer = bench.Bench([8], 16).build(row["mixer"])
        assert row["linear"] == "dense" and row["tokens_per_second"] > 0 and not row["note"]
        assert row["growth_exponent"] is not None
        last = row["length"] == 16
        assert row["state_bytes"] == (layer.state_bytes(1, 16) if last else None)
        assert (row["decode_us"] is not None) is last
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > 1000
    out = capsys.readouterr().out
    assert "rg_lru" in out and "growth" in out


def test_a_backend_that_is_not_its_reference_gets_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(a: torch.Tensor, b: torch.Tensor, *rest: Any, **kw: Any) -> Any:
        h, last = linear_scan.implementations["reference"][0](a, b, *rest, **kw)
        return h * (1 + 0.01 * (h.shape[1] > 64)), last  # only where a chunk has ended

    broken = {**linear_scan.implementations, "broken": (wrong, lambda *a, **k: None)}
    monkeypatch.setattr(linear_scan, "implementations", broken)
    rows = bench.Bench([8, 16], 16).run("rg_lru")
    assert all(r.tokens_per_second is None and r.decode_us is None for r in rows)
    assert all("parity" in r.note and "linear_scan" in r.note for r in rows)
    assert all("broken" in r.note for r in rows)
    assert bench.Bench([8], 16).run("gru")[0].tokens_per_second  # it takes other kernels


def test_cells_predicted_to_take_too_long_are_skipped() -> None:
    first, second = bench.Bench([8, 4096], 16, cell_s=1e-6).run("rg_lru")
    assert first.tokens_per_second and first.growth_exponent is None
    assert second.tokens_per_second is None and "predicted" in second.note


@pytest.mark.slow
def test_a_mixer_of_bounded_length_is_measured_up_to_it() -> None:
    rows = bench.Bench([1024, 4096], 16).run("aft_local")
    assert rows[0].tokens_per_second and rows[0].decode_us and not rows[0].note
    assert rows[1].tokens_per_second is None and "raise max_len" in rows[1].note
    rows = bench.Bench([2048], 16).run("aft_local")  # decoding goes on behind its last place
    assert rows[0].tokens_per_second and "decoding fails" in rows[0].note


@pytest.mark.slow
def test_what_attends_to_a_memory_has_one_as_long_as_its_document() -> None:
    small, large = bench.Bench([16, 1024], 16).run("cross_attention")
    for row in (small, large):
        assert row.tokens_per_second and not row.note, row
    assert large.decode_us and large.state_bytes


def test_growth_and_prediction() -> None:
    seconds = {n: 3e-9 * n**2 for n in (1024, 2048, 4096)}
    assert bench.exponent(seconds) == pytest.approx(2)
    assert bench.extrapolate(seconds, 8192) == pytest.approx(3e-9 * 8192**2)
    assert bench.extrapolate({1024: 1.0, 2048: 1.5}, 4096) == pytest.approx(
        3.0
    )  # never below linear


@pytest.mark.parametrize(
    "words,said",
    [
        (["--only", "rg_lur"], "did you mean 'rg_lru'"),
        (["--lengths", "1k,-4"], "positive numbers"),
        (["--linear", "dens"], "did you mean 'dense'"),
    ],
)
def test_wrong_words_are_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "mixers", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_mixer_and_preset_is_known() -> None:
    assert {"attention", "rg_lru", "mamba2", "gated_deltanet"} <= set(bench.names())
