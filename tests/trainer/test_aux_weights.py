"""Losses that modules report are weighed by the table of the objective, however composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from pydantic import ValidationError
from thinned import only
from trainer_runs import losses, make_run, rows, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.objectives.codec import CodecConfig
from mm.objectives.vq import VqObjectiveConfig
from mm.registry import NETWORKS, OBJECTIVES
from mm.run import Run
from mm.trainer.loop import train
from mm.trainer.stage import build, make_module

MODEL = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {
        "kind": "stack",
        "depth": 2,
        "pattern": "transformer_vq",
        "mixers": {"transformer_vq": {"heads": 2, "codes": 8, "block": 4}},
        "ffn": {"kind": "swiglu", "hidden": 32},
    },
}
COMMITMENT = {"kind": "next_token", "aux_weights": {"commitment": 3.0}}


def vq_run(out: Path, name: str, objective: Any = COMMITMENT, **change: Any) -> Run:
    run = make_run(out, name, objective=objective, **change)
    values = run.to_dict()
    values["model"] = MODEL
    return Run.model_validate(values)


def gradients(objective: Any, micro: int) -> dict[str, torch.Tensor]:
    """Of one step of eight rows in micro-batches of ``micro``, by parameter."""
    vocabulary = toys.vocabulary()
    model = NETWORKS.parse(MODEL)
    net = make_module(model, vocabulary, 0, torch.device("cpu")).train()
    made = build(OBJECTIVES.parse(objective), vocabulary=vocabulary)
    stream = toys.ToyStream(toys.ToyStreamConfig(micro=micro), vocabulary, 0, 0, 1)
    micros = stream.next()
    counts = [made.counts(b) for b in micros]
    n = {k: torch.stack([c[k].float() for c in counts]).sum() for k in counts[0]}
    scales = made.scales(n)
    call = lambda b, **kw: net(b, seed=0, **kw)
    for term in made.terms(micros, {"model": call}, None):
        torch.stack([scales[k] * s / n[k] for k, s in term.losses.items()]).sum().backward()
    return {k: p.grad for k, p in net.named_parameters() if p.grad is not None}


def test_commitment_of_stacked_blocks_reaches_the_weights_alike_in_any_micro_batches() -> None:
    """1x8 = 2x4 = 4x2; without the table the keys get another gradient."""
    whole = gradients(COMMITMENT, 8)
    for micro in (4, 2):
        split = gradients(COMMITMENT, micro)
        for name, grad in whole.items():
            torch.testing.assert_close(split[name], grad, rtol=1e-3, atol=1e-6)
    without = gradients("next_token", 8)
    changed = [k for k, g in whole.items() if not torch.allclose(without[k], g, rtol=1e-2)]
    assert sum("mixer.qkv" in name for name in changed) == 2, "both blocks"


@pytest.mark.parametrize("stage", only([0, 3], 0))
def test_the_loop_weighs_and_logs_them(tmp_path: Path, stage: int) -> None:
    runs = [vq_run(tmp_path, f"m{m}", data={"micro": m}, stage=stage) for m in (8, 4)]
    for run in runs:
        train(run)
    a, b = ([row["loss/commitment"] for row in rows(run)] for run in runs)
    assert a == pytest.approx(b, rel=2e-5) and a[0] > 0
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=2e-5)
    first = rows(runs[0])[0]
    modules = [v for k, v in first.items() if k.startswith("aux/") and k.endswith("commitment")]
    assert len(modules) == 2 and first["loss/commitment"] == pytest.approx(sum(modules), rel=1e-5)
    text = first["tokens/text_share"]
    plain = text * first["loss/text"] + (1 - text) * first["loss/image"]
    assert first["loss/total"] == pytest.approx(plain + 3 * first["loss/commitment"], rel=1e-2)


@pytest.mark.slow
def test_two_ranks_weigh_them_as_one_does(tmp_path: Path) -> None:
    """Half of the rows each, of other lengths: the losses of one process with all of them."""
    two, one = (vq_run(tmp_path, name, data={"micro": 2}) for name in ("two", "one"))
    torchrun(2, [two])
    train(one)
    for name in ("loss/total", "loss/commitment"):
        a, b = ([row[name] for row in rows(run)] for run in (one, two))
        assert a == pytest.approx(b, rel=2e-5), name


def test_a_loss_that_no_module_reports_is_named(tmp_path: Path) -> None:
    objective = {"kind": "next_token", "aux_weights": {"balance": 0.1}}
    with pytest.raises(UserError, match="no module reports 'balance', only commitment"):
        train(vq_run(tmp_path, "run", objective))
    with pytest.raises(UserError, match="'text' is a loss of this objective"):
        train(vq_run(tmp_path, "run", {"kind": "next_token", "aux_weights": {"text": 0.1}}))


@pytest.mark.parametrize("config", [VqObjectiveConfig, CodecConfig])
def test_the_old_key_is_refused_with_the_new_name(config: Any) -> None:
    with pytest.raises(ValidationError, match="'commitment' is called 'aux_weights.commitment'"):
        config(commitment=0.1)
    made = config().build()
    assert made.scales({"commitment": torch.ones(())}) == {"commitment": 0.25}
