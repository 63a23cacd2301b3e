"""The laws of training: ZeRO stages, ranks and micro-batches change no loss."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_toys as toys
from trainer_runs import losses, make_run, rows, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.batch import Batch, Values
from mm.data.batching.collate import to_batch
from mm.model.layer import ModelOut
from mm.registry import BACKBONES, EMBEDDERS, NETWORKS, OBJECTIVES, OPTIMIZERS
from mm.run import Run
from mm.specs import Segment
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.env import TrainerEnv
from mm.trainer.loop import train
from mm.trainer.stage import all_networks, build, make_module

HELD_OUT = {"eval_every": 2, "eval_batches": 2}
SAME = {"rel": 2e-6, "abs": 1e-6}  # printed precision


def adafactor_run(out: Path, name: str, stage: int) -> Run:
    """A run whose optimizer needs sums over whole parameters, which ZeRO cuts."""
    run = make_run(out, name, stage=stage)
    optimizer = OPTIMIZERS.parse({"kind": "adafactor", "factored": False, "lr": 1e-2})
    stages = (run.stages[0].model_copy(update={"optimizer": optimizer}),)
    return run.model_copy(update={"stages": stages})


def by_rank_run(out: Path, name: str, stage: int, **model: Any) -> Run:
    """A run of a language model whose rank 1 alone has conditions and lacks text."""
    run = make_run(out, name, stage=stage, data={"by_rank": True})
    config = NETWORKS.get("lm")(d_model=16, **model)  # type: ignore[call-arg]
    return run.model_copy(update={"model": config})


def encoder_decoder_run(out: Path, name: str, stage: int, recompute: str) -> Run:
    """A run whose rank 1 alone has conditions to encode."""
    backbone = BACKBONES.get("encoder_decoder").smallest()
    backbone = backbone.model_copy(update={"recompute": recompute})
    return by_rank_run(out, name, stage, backbone=backbone)


def apart_run(out: Path, name: str, stage: int) -> Run:
    """A run whose rank 1 alone has images; each step draws the width of all feed-forwards."""
    ffn = {"kind": "nested", "hidden": 16, "granularities": 3}
    values = make_run(out, name, stage=stage, data={"by_rank": True}).to_dict()
    values["model"] = {
        "kind": "lm",
        "d_model": 16,
        "backbone": {"kind": "stack", "mixers": {"attention": {"heads": 2}}, "ffn": ffn},
        "linear": {"kind": "by_modality", "groups": [["text"], ["image"]], "targets": ["qkv"]},
    }
    return Run.model_validate(values)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs that need two processes, in ONE torchrun.

    Every stage with rank 1 lacking text, and runs stopped by a signal after 3 steps.
    """
    out = tmp_path_factory.mktemp("two")
    runs = {
        f"lack{s}": make_run(out, f"lack{s}", stage=s, data={"by_rank": True}, stage_keys=HELD_OUT)
        for s in range(4)
    }
    runs |= {
        f"gan{s}": make_run(out, f"gan{s}", stage=s, objective="toy_gan", data={"micro": 2})
        for s in (0, 3)
    }
    runs |= {
        f"half{s}": make_run(out, f"half{s}", stage=s, data={"signal_at": 2}) for s in range(4)
    }
    runs |= {
        f"halves{s}": encoder_decoder_run(out, f"halves{s}", s, again)
        for s, again in ((1, "full"), (3, "selective"))
    }
    runs["sums"] = adafactor_run(out, "sums", stage=2)
    still = {"optimizer": {"kind": "adamw", "lr": 1e-12, "weight_decay": 0.0}}
    keys = still | HELD_OUT | {"eval_every": 1, "early_stop": 2}
    runs["early"] = make_run(out, "early", stage=3, stage_keys=keys)
    runs["early"] = Run.model_validate(runs["early"].to_dict() | {"export": "best"})
    os.environ["WANDB_MODE"] = "disabled"
    said = torchrun(2, list(runs.values()))
    (out / "stderr.txt").write_text(said)
    return runs


def test_two_ranks_say_once_that_a_signal_stopped_them(two_ranks: dict[str, Run]) -> None:
    said = (two_ranks["half0"].out / "stderr.txt").read_text()
    assert said.count("stopped by a signal at step") == 4  # of half0 to half3


def test_stages_are_equal_with_a_rank_that_lacks_a_modality(
    two_ranks: dict[str, Run], tmp_path: Path
) -> None:
    """Losses, held-out ones too, of ZeRO 0 to 3 with 1 and 2 processes are equal as printed.

    fp32 and AdamW.
    """
    alone = make_run(tmp_path, "alone", stage=0, data={"by_rank": True}, stage_keys=HELD_OUT)
    train(alone)
    held_out = [k for k in rows(alone)[-1] if k.startswith("val/")]
    assert len(held_out) >= 6
    for name in ("loss/total", "loss/text", "loss/image", "optim/grad_norm", *held_out):
        expected = [row[name] for row in rows(alone) if name in row]
        for s in range(4):
            found = [row[name] for row in rows(two_ranks[f"lack{s}"]) if name in row]
            assert found == pytest.approx(expected, rel=2e-5 if "grad" in name else 2e-6), (name, s)


def test_sums_over_a_parameter_are_those_of_all_ranks(
    two_ranks: dict[str, Run], tmp_path: Path
) -> None:
    alone = adafactor_run(tmp_path, "alone", stage=0)
    train(alone)
    assert losses(two_ranks["sums"]) == pytest.approx(losses(alone), rel=1e-5)


def test_an_encoder_runs_on_a_rank_without_conditions(
    two_ranks: dict[str, Run], tmp_path: Path
) -> None:
    alone = encoder_decoder_run(tmp_path, "alone", 0, "none")
    train(alone)
    for s in (1, 3):
        assert losses(two_ranks[f"halves{s}"]) == pytest.approx(losses(alone), rel=2e-6), s


@pytest.mark.slow
def test_weights_by_modality_and_drawn_widths_are_those_of_one_rank(tmp_path: Path) -> None:
    alone, two = apart_run(tmp_path, "alone", stage=0), apart_run(tmp_path, "two", stage=3)
    train(alone)
    torchrun(2, [two])
    assert losses(two) == pytest.approx(losses(alone), rel=2e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_embedders_on_a_rank_that_lacks_a_modality(tmp_path: Path) -> None:
    """ZeRO-3 gathers the same tables everywhere; tied heads, too, where they can be."""
    backbone, runs, alone = BACKBONES.get("stack").smallest(), dict[str, Run](), dict[str, Run]()
    for kind in EMBEDDERS:
        head = {"kind": "softmax", "tied": kind != "by_modality"}
        model = {"embedder": EMBEDDERS.get(kind).smallest(), "heads": {"tokens": head}}
        runs[kind] = by_rank_run(tmp_path, kind, 3, backbone=backbone, **model)
        alone[kind] = by_rank_run(tmp_path, f"{kind}-alone", 0, backbone=backbone, **model)
        train(alone[kind])
    torchrun(2, list(runs.values()), timeout_s=400)
    for kind, run in runs.items():
        assert losses(run) == pytest.approx(losses(alone[kind]), rel=2e-6), kind


def test_two_ranks_end_a_stage_early_together(two_ranks: dict[str, Run]) -> None:
    """Where nothing is learnt: what rounding makes of a loss is the same on both."""
    run = two_ranks["early"]
    assert 3 <= rows(run)[-1]["step"] <= 5
    assert (run.folder / "checkpoints" / "best").is_file()
    assert (run.folder / "model.step").read_text().endswith("best")


def test_two_networks_are_equal_with_two_ranks(two_ranks: dict[str, Run], tmp_path: Path) -> None:
    alone = make_run(tmp_path, "alone", objective="toy_gan")
    train(alone)
    for s in (0, 3):
        for name in ("loss/nll", "loss/critic", "loss/fool"):
            found = [row[name] for row in rows(two_ranks[f"gan{s}"])]
            assert found == pytest.approx([row[name] for row in rows(alone)], rel=2e-5), (name, s)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_on_another_world_size_and_stage(
    two_ranks: dict[str, Run], tmp_path: Path, stage: int
) -> None:
    """3 steps by two processes, 3 more by one at ANOTHER stage: as one process all along."""
    whole = make_run(tmp_path, "whole")
    train(whole)
    half = two_ranks[f"half{stage}"]
    assert checkpoint.newest(half.folder / "checkpoints").state["world"] == 2
    on = make_run(half.out, half.name, stage=3 - stage)
    assert train(on)["resumed_from"] == 3
    assert losses(on) == pytest.approx(losses(whole), rel=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16"])
def test_micro_batches_of_the_whole_loop(tmp_path: Path, precision: str) -> None:
    """1x8 = 2x4 = 8x1 through engine, schedule, clip and EMA statistics."""
    runs = [
        make_run(tmp_path, f"m{m}", data={"micro": m}, engine={"precision": precision})
        for m in (8, 4, 1)
    ]
    for run in runs:
        train(run)
    for other in runs[1:]:
        assert losses(other) == pytest.approx(
            losses(runs[0]), rel=2e-6 if precision == "fp32" else 5e-3
        )
        assert rows(other)[-1]["codebook/perplexity"] == pytest.approx(
            rows(runs[0])[-1]["codebook/perplexity"]
        )


# ---- micro-batches over the registry: gradients of the first step of every objective
# -----------------------------------------


def _tokens(rows_: range) -> Batch:
    return toys.ToyStream(toys.ToyStreamConfig(), toys.vocabulary(), 0, 0, 1)._batch(rows_)


def _pairs(rows_: range) -> Batch:
    """Each row beside another one of its length: document m of both is a pair."""
    b = _tokens(rows_)
    other = lambda ids: torch.where(ids >= 20, 18 + (ids * 5) % 7, ids)
    return replace(b, parts={"rejected": replace(b, ids=other(b.ids), targets=other(b.targets))})


def _items(modality: str, make: Any) -> Any:
    def batch(rows_: range) -> Batch:
        data = torch.stack([make(torch.Generator().manual_seed(r)) for r in rows_])
        values = {modality: Values.items(data)}
        if modality == "audio":
            values["audio"] = Values.items(data, torch.full((len(data),), data.shape[1]))
        return Batch.of_values(values, keys=tuple(str(r) for r in rows_))

    return batch


def _captioned(rows_: range) -> Batch:
    """A picture of a few codes and its caption; two of the captions are the same."""
    rows: list[list[list[Segment]]] = []
    for r in rows_:
        codes = np.random.default_rng(r).integers(0, 8, 3 + r)
        image = Segment("image", codes, role="condition")
        rows.append([[image, Segment("text", np.array([r % 3, 1]))]])
    return to_batch(rows, toys.vocabulary(), 16, len(rows))


EMBEDS = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {"kind": "stack", "depth": 1, "pattern": "attention"},
    "heads": {"embedding": {"kind": "embedding", "d_out": 8}},
}


RECIPES: dict[str, tuple[str, Any]] = {  # objective -> (network it trains, batch of given rows)
    "next_token": ("toy_lm", _tokens),
    "distil": ("lm", _tokens),
    "dpo": ("lm", _pairs),
    "toy_gan": ("toy_lm", _tokens),
    "vq": ("image_vq", _items("image", lambda g: torch.rand(3, 32, 32, generator=g))),
    "codec": ("audio_codec", _items("audio", lambda g: 0.1 * torch.randn(8000, generator=g))),
    "replaced_token": (EMBEDS | {"heads": {"replaced": "binary"}}, _tokens),  # type: ignore
    "contrastive": (EMBEDS, _captioned),  # type: ignore[dict-item]
}


def recipe(kind: str) -> tuple[Any, Any]:
    """The recipe of an objective, or of the one whose config its own extends."""
    for cls in OBJECTIVES.get(kind).__mro__:
        declared = getattr(cls, "model_fields", {}).get("kind")
        if declared is not None and declared.default in RECIPES:
            return RECIPES[declared.default]
    raise AssertionError(f"objective '{kind}' has no network and batch: add a line to RECIPES")


def gradients(kind: str, micro: int, rows_: int = 4) -> dict[str, torch.Tensor]:
    """Gradients of every network after one step's terms over ``rows_`` rows.

    In micro-batches of ``micro``.
    """
    network, make = recipe(kind)
    vocabulary = toys.vocabulary()
    named = isinstance(network, str)
    config = NETWORKS.get(network).smallest() if named else NETWORKS.parse(network)
    run = Run.model_construct(model=config)
    objective = build(OBJECTIVES.get(kind).smallest(), vocabulary=vocabulary)
    nets = {
        name: make_module(net.config, vocabulary, 0, torch.device("cpu")).train()
        for name, net in all_networks(run, objective).items()
    }
    env = TrainerEnv(0, torch.device("cpu"), "fp32")
    env.lend({name: type("Raw", (), {"raw": net}) for name, net in nets.items()}, {})  # type: ignore[misc]
    scheduled = objective.scheduled(0, __import__("numpy").random.default_rng(0))
    env.begin(0, scheduled)
    micros = [
        objective.corrupt(make(range(i, i + micro)), env.rng, scheduled)
        for i in range(0, rows_, micro)
    ]

    def call(name: str) -> Any:
        def forward(batch: Batch, **kw: Any) -> ModelOut:
            return nets[name](batch, **{"scheduled": scheduled, "seed": 0, **kw})

        return forward

    counts = [objective.counts(b) for b in micros]
    n = {k: torch.stack([c[k].float() for c in counts]).sum() for k in counts[0]}
    scales = objective.scales(n)
    for term in objective.terms(micros, {name: call(name) for name in nets}, env):
        torch.stack(
            [scales[k] * s / n[k].clamp_min(1e-12) for k, s in term.losses.items()]
        ).sum().backward()
    return {
        f"{net}.{name}": p.grad
        for net, module in nets.items()
        for name, p in module.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("kind", [*sorted(OBJECTIVES), "toy_gan"])
def test_micro_batches_of_every_objective(kind: str) -> None:
    """Gradients of 1x4, 2x2 and 4x1 are equal to rounding; a new objective needs a recipe here."""
    whole = gradients(kind, 4)
    assert whole and any(g.abs().sum() > 0 for g in whole.values())
    scale = max(g.abs().max() for g in whole.values())
    for micro in (2, 1):
        split = gradients(kind, micro)
        assert split.keys() == whole.keys()
        for name, g in whole.items():
            assert torch.allclose(split[name], g, rtol=1e-3, atol=float(1e-5 * scale)), (
                name,
                micro,
            )
