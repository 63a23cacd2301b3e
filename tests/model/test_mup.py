"""muP: coordinate check, rates of the optimizers, refusals, the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mm.bench import mup
from mm.cli import bench_mup
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, OPTIMIZERS

WIDTHS = (64, 128, 256)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 3e-3), ("lion", 1e-3)])
def test_coordinate_check(optimizer: str, lr: float) -> None:
    """Four steps move activations equally far at every width under muP, ever farther without."""
    rows = mup.check(WIDTHS, optimizer=optimizer, lr=lr)
    scaled, standard = (
        mup.slopes(row for row in rows if row.parametrisation == kind)
        for kind in ("mup", "standard")
    )
    assert scaled.keys() == {"hidden", "hidden.1", "logits"}
    assert all(abs(scaled[place]) < 0.15 for place in ("hidden", "hidden.1")), scaled
    assert -0.5 < scaled["logits"] < 0.15, scaled
    assert standard["hidden.1"] > 0.4 and standard["logits"] > 0.4, standard
    base = [row for row in rows if row.width == WIDTHS[0]]
    changes = [[r.change for r in base if r.parametrisation == k] for k in ("mup", "standard")]
    assert changes[0] == changes[1]  # nothing changes at the base width


def test_rates_and_scales() -> None:
    """At four times the base: matrices a quarter of the rate, the same decay, read-outs halved."""
    torch.manual_seed(0)
    wide = mup.config(256, 64).build()
    init_weights(wide)
    torch.manual_seed(0)
    plain = mup.config(256, None).build()
    init_weights(plain)
    assert torch.equal(wide.heads["tokens"].weight * 2, plain.heads["tokens"].weight)
    names = {p: name for name, p in wide.named_parameters()}
    optimizer = OPTIMIZERS.parse({"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1}).build(wide)
    found = {names[p]: g for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        matrix = wide.get_parameter(name).dim() > 1
        times = 0.5 if name == "embedder.weight" else 0.25 if matrix else 1.0
        assert group["lr"] == pytest.approx(1e-2 * times), name
        decayed = matrix and "embed" not in name
        assert group["weight_decay"] * group["lr"] == pytest.approx(1e-3 if decayed else 0), name


def test_what_has_no_mup_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'sgd_sai' has no muP rates"):
        OPTIMIZERS.parse("sgd_sai").build(mup.config(64, 32).build())
    with pytest.raises(ValidationError, match="heads of their own"):
        tied = {"tokens": {"kind": "softmax", "tied": True}}
        NETWORKS.parse({"kind": "lm", "mup_base": 64, "heads": tied})


def test_command_writes_figures_and_a_plot(tmp_path: Path) -> None:
    figures, picture = tmp_path / "mup.json", tmp_path / "mup.png"
    bench_mup.mup("32,64", 3e-3, 1, "adamw", figures, picture)
    rows = json.loads(figures.read_text())
    assert {row["parametrisation"] for row in rows} == {"mup", "standard"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    for widths, optimizer in (("64", "adamw"), ("64,100", "adamw"), ("64,128", "muon")):
        with pytest.raises(UserError, match="--widths|--optimizer"):
            bench_mup.mup(widths, 3e-3, 1, optimizer, None, None)
