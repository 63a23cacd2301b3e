"""What is watched besides the loss: by modality, by layer, of the machine; and no bit moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import start_toys
import torch
from safetensors.torch import load_file
from slow_rank import ToySlowConfig
from trainer_runs import Calls, make_run, rows, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.kernels.op import Op
from mm.registry import CALLBACKS
from mm.run import Run
from mm.trainer.callbacks import machine
from mm.trainer.log.clock import StepClock
from mm.trainer.loop import Trainer, train

CALLBACKS._modules.pop("toy_slow", None)  # the laws of other files do not run over it
PATTERN = "attention mamba2 gated_deltanet rg_lru"
LAYERS = {"kind": "layers", "every": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_toys.packed(tmp_path_factory.mktemp("watch"))


def lm(root: Path, out: Path, name: str, *callbacks: Any, **change: Any) -> Run:
    """A model of four mixers on captioned pictures."""
    values = start_toys.values(root, out, name, steps=4, callbacks=list(callbacks), **change)
    values["model"]["backbone"] |= {"pattern": PATTERN, "depth": 4}
    return Run.model_validate(values)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(str(run.folder / "model" / "model.safetensors"))


def test_watching_all_of_it_moves_no_bit(root: Path, tmp_path: Path) -> None:
    often = {"kind": "modalities", "every": 1}
    watched = lm(root, tmp_path, "watched", LAYERS, often, {"kind": "machine", "every": 1})
    plain = lm(root, tmp_path, "plain", {"kind": "modalities", "every": 1000})
    for run in (watched, plain):
        train(run)
    a, b = weights(watched), weights(plain)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r["loss/total"] for r in rows(watched)] == [r["loss/total"] for r in rows(plain)]
    assert Op.observer is None


def test_layers_are_seen_in_the_steps_that_are_due(root: Path, tmp_path: Path) -> None:
    run = lm(root, tmp_path, "layers", LAYERS)
    train(run)
    found = rows(run)
    assert [any(k.startswith("layers/") for k in row) for row in found] == [False, True] * 2
    row = {k.removeprefix("layers/"): v for k, v in found[1].items() if k.startswith("layers/")}
    mixers = [k.rpartition("/")[0] for k in row if k.endswith("mixer/activation_rms")]
    assert len(mixers) == 4
    for path in {k.rpartition("/")[0] for k in row if "activation" in k}:
        assert row[f"{path}/activation_rms"] > 0 and row[f"{path}/gradient_rms"] > 0
    attention, *recurrent = mixers
    assert 0 < row[f"{attention}/attention_entropy"] < math.log(512)
    assert f"{attention}/decay" not in row
    for path in recurrent:
        assert 0 < row[f"{path}/decay"] < 1, path
        assert row[f"{path}/state_rms"] > 0, path
        assert f"{path}/attention_entropy" not in row


def test_layer_figures_are_those_of_the_tensors(root: Path, tmp_path: Path) -> None:
    """The root mean square of a block's output and of its gradient, taken by hand."""
    run = lm(root, tmp_path, "hand", {"kind": "layers", "every": 1}, stage={"budget": {"steps": 1}})
    seen: dict[str, list[torch.Tensor]] = {"y": [], "grad": []}

    def watch(trainer: Any) -> None:
        block = trainer.stage.engines["model"].raw.backbone.layers[1]

        def look(module: Any, given: Any, out: Any) -> None:
            if not module.training:  # a held-out loss
                return
            seen["y"].append(out.y.detach().clone())
            out.y.register_hook(lambda grad: seen["grad"].append(grad.clone()))

        block.register_forward_hook(look)

    Trainer(run, [Calls("on_stage_start", watch)]).fit()
    (row,) = (r for r in rows(run) if "loss/total" in r)
    for figure, found in (("activation_rms", seen["y"]), ("gradient_rms", seen["grad"])):
        by_hand = torch.cat([t.flatten() for t in found]).square().mean().sqrt()
        told = next(v for k, v in row.items() if k.endswith(f"layers.1/{figure}"))
        assert told == pytest.approx(float(by_hand), rel=1e-5), figure


def test_compiled_blocks_are_refused(root: Path, tmp_path: Path) -> None:
    run = lm(root, tmp_path, "compiled", LAYERS, engine={"compile": True})
    with pytest.raises(UserError, match=r"callbacks\.layers: .* engine\.compile=false"):
        train(run)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_ranges_are_those_of_every_zero_stage(
    stage: int, root: Path, tmp_path: Path
) -> None:
    """Against autograd alone, which no engine has touched."""
    often = {"kind": "modalities", "every": 1}
    engine = {"zero_stage": stage, "grad_clip": 1e-3}  # what is told is not clipped
    run = lm(root, tmp_path, f"z{stage}", often, engine=engine, stage={"budget": {"steps": 1}})
    kept: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        with trainer.unsharded() as module:
            kept["state"] = {k: v.detach().clone() for k, v in module.state_dict().items()}
        kept["config"], kept["words"] = trainer.run.model, trainer.vocabulary
        kept["objective"] = trainer.stage.objective

    trainer = Trainer(run, [Calls("on_stage_start", keep)])
    trainer.fit()
    module = kept["config"].build(kept["words"])
    module.load_state_dict(kept["state"])
    module.train()
    batches = [b for b in trainer.batches]
    n = sum(float(b.weight.sum()) for b in batches)
    right, asked = (
        dict.fromkeys(kept["words"].modalities, 0),
        dict.fromkeys(kept["words"].modalities, 0),
    )
    for b in batches:
        out = module(b)
        places = b.places["tokens"].long()
        loss = (out.heads["tokens"].nll * b.weight.flatten()[places]).sum() / n
        loss.backward()
        with torch.no_grad():
            logits = out.hidden.flatten(0, 1)[places] @ module.heads["tokens"].weight.T
            hits = logits.argmax(-1) == b.targets[..., 0].flatten()[places]
        which = b.labels["target_modality"].flatten()[places]
        for i, name in enumerate(kept["words"].modalities, start=1):
            right[name] += int(hits[which == i].sum())
            asked[name] += int((which == i).sum())
    (row,) = (r for r in rows(run) if "loss/total" in r)
    for suffix, weight in (
        ("embedding", module.embedder.weight),
        ("head", module.heads["tokens"].weight),
    ):
        for name in kept["words"].modalities:
            span = kept["words"].range(name)
            by_hand = float(weight.grad[span.begin : span.stop].norm())
            assert by_hand > 0
            assert row[f"grad/{name}_{suffix}"] == pytest.approx(by_hand, rel=1e-4), suffix
    for name, count in asked.items():
        few = count > 512  # then it is a sample of the places
        told = row[f"accuracy/{name}"]
        assert 0 <= told <= 1 and (few or told == pytest.approx(right[name] / count))


def test_shares_of_targets_add_up(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    train(run)
    for row in rows(run):
        assert row["targets/text_share"] + row["targets/image_share"] == pytest.approx(1)


def test_parts_of_a_step_are_the_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=12)
    train(run)
    for row in rows(run)[2:]:
        parts = sum(row[f"time/{p}"] for p in ("data", "forward", "backward", "optimizer"))
        assert 0.5 * row["perf/step_seconds"] < parts + row["time/communication"]
        assert parts + row["time/communication"] <= row["perf/step_seconds"] * 1.01
        assert row["perf/tokens_per_second_device"] == row["perf/tokens_per_second"]
    assert rows(run)[9]["memory/host_peak_mib"] > 50


def test_marks_of_a_clock_are_parts() -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.seconds() == {}
    clock.start()
    for part in ("forward", "backward", "forward"):
        clock.mark(part)
    seconds = clock.seconds()
    assert seconds["forward"] > seconds["optimizer"] == 0
    clock.start()
    assert clock.seconds() == {}


def test_mfu_counts_what_a_token_is_multiplied_with(root: Path, tmp_path: Path) -> None:
    run = lm(root, tmp_path, "mfu", stage={"budget": {"steps": 1}})

    def look(trainer: Any) -> None:
        module = trainer.stage.engines["model"].raw
        total = sum(p.numel() for p in module.parameters())
        assert machine.multiplied_weights(module) == total - module.embedder.weight.numel()

    Trainer(run, [Calls("on_stage_start", look)]).fit()
    assert machine.peak_flops(torch.device("cpu"), "fp32") == 0
    assert not any("mfu" in k for r in rows(run) for k in r)  # not known of this machine


@pytest.mark.slow
def test_the_slowest_rank_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "slow", steps=6)
    slow = {"kind": "toy_slow", "rank": 1, "seconds": 0.1}
    watch = [ToySlowConfig.model_validate(slow), CALLBACKS.parse({"kind": "machine", "every": 2})]
    torchrun(2, [run.model_copy(update={"callbacks": watch, "imports": ("slow_rank",)})])
    last = rows(run)[5]
    assert last["ranks/slowest"] == 1
    assert last["ranks/1"] == last["ranks/slowest_seconds"] > last["ranks/0"] + 0.05
