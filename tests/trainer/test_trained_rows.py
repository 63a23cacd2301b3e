"""`train_rows` of a stage: rows of new ids learn in tables whose other rows keep every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from test_stage_border import assert_same, stopped, two_stages
from test_trainable import at, moved, with_stages
from torch import nn
from trainer_runs import Calls, make_run, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, OPTIMIZERS
from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import Trainer, train
from mm.trainer.trainable import hold_other_rows, n_trained, set_trainable

EACH = {"every": 1, "keep_last": 9}
TABLE = "embed.weight"


def rows() -> slice:
    ids = toys.vocabulary().range("image")
    return slice(ids.begin, ids.stop)


def new_rows(out: Path, name: str, kind: str, zero: int, precision: str = "fp32") -> Run:
    """The toy's pictures as the new modality; everything that could move old rows is on."""
    optimizer = {"kind": kind, "lr": 1e-2, "weight_decay": 0.5, "decay": "all"}
    stage = {
        "train": ["embed.*", "up.*"],
        "train_rows": ["image"],
        "optimizer": optimizer,
        "schedule": {"shape": "constant", "warmup": 2},
        "ema": {"decay": 0.5},
    }
    engine = {"precision": precision}
    return make_run(
        out, name, steps=3, stage=zero, stage_keys=stage, engine=engine, checkpoints=EACH
    )


def begun_and_ended(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The table, and what the trainer holds of it: as the stage began, and in its last save."""
    start: dict[str, torch.Tensor] = {}
    keep = lambda t: start.update(
        {k: v.clone() for k, v in t.stage.engines["model"].weights().items()}
    )
    Trainer(run, [Calls("on_stage_start", keep)]).fit()
    return start, at(run, 3)


def assert_new_alone(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> None:
    assert moved({k: v for k, v in start.items() if k != "seen"}, end) == {
        TABLE,
        "up.weight",
        "up.bias",
    }
    other = torch.ones(len(end[TABLE]), dtype=torch.bool)
    other[rows()] = False
    same = (start[TABLE] == end[TABLE]).all(1)
    assert torch.equal(same, other), "rows that moved are those of the new ids, all of them"


CHEAP = [(kind, 1) for kind in sorted(OPTIMIZERS)] + [("adamw", 0), ("adamw", 3)]
LONG = [(kind, zero) for kind in sorted(OPTIMIZERS) for zero in (0, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "zero"),
    [*CHEAP, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONG if each not in CHEAP)],
)
def test_old_rows_keep_every_bit(tmp_path: Path, kind: str, zero: int) -> None:
    """Under decay, momentum and averages of the weights."""
    refused = OPTIMIZERS.parse(kind).refusal(zero, "constant")
    if refused:
        pytest.skip(refused)
    run = new_rows(tmp_path, "run", kind, zero)
    start, end = begun_and_ended(run)
    assert_new_alone(start, end)
    made = toys.load_toy(run.folder)[TABLE]  # the average
    assert not torch.equal(made, end[TABLE])
    assert_new_alone(start, end | {TABLE: made})
    ids = rows()
    n = (ids.stop - ids.start) * end[TABLE].shape[1]
    learned = n + end["up.weight"].numel() + end["up.bias"].numel()
    said = json.loads((run.folder / "start.json").read_text())
    assert said["trained"]["model"] == learned


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_keeps_the_bits_of_its_masters(tmp_path: Path, zero: int) -> None:
    start, end = begun_and_ended(new_rows(tmp_path, "run", "adamw", zero, "bf16"))
    assert_new_alone(start, end)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_resume_inside_the_stage_and_the_next_one_is_bitwise(tmp_path: Path, zero: int) -> None:
    """In the second stage all rows train again."""
    first = {"train": ["embed.*"], "train_rows": ["image"]}
    whole = with_stages(two_stages(tmp_path, "whole", "plain", stage=zero), first, {})
    train(whole)
    for name, data in (("border", ({"signal_at": 2}, {})), ("inside", ({"signal_at": 1}, {}))):
        halves = with_stages(two_stages(tmp_path, name, "plain", data, stage=zero), first, {})
        stopped(halves)
        train(halves)
        assert_same(whole, halves)
    assert_all_moved(whole)


def assert_all_moved(run: Run) -> None:
    before, after = at(run, 3)[TABLE], at(run, 6)[TABLE]
    assert not (before == after).all(1).any()


@pytest.mark.slow
def test_two_processes_hold_the_old_rows_at_every_stage(tmp_path: Path) -> None:
    """Flat shards cut the table where they like; new rows learn as in one process."""
    start, alone = begun_and_ended(new_rows(tmp_path, "alone", "adamw", 1))
    runs = [new_rows(tmp_path, f"zero{zero}", "adamw", zero) for zero in range(4)]
    torchrun(2, runs)
    for run in runs:
        saved = checkpoint.newest(run.folder / "checkpoints")
        assert saved is not None and saved.state["step"] == 3
        end = dict(saved.tensors("model"))
        assert_new_alone(start, end)
        torch.testing.assert_close(end[TABLE], alone[TABLE], rtol=1e-4, atol=1e-6)


def test_tables_of_a_language_model(tmp_path: Path) -> None:
    """Embedder and head that share nothing; a module with tables by modality names them itself."""
    ids = rows()

    def marked(modalities: tuple[str, ...] = ("image",), **model: Any) -> nn.Module:
        backbone = {"kind": "stack", "depth": 1, "pattern": "attention"}
        config = {"kind": "lm", "d_model": 16, "backbone": backbone, **model}
        net = NETWORKS.parse(config).build(toys.vocabulary())
        init_weights(net)
        stage = new_rows(tmp_path, "x", "adamw", 1).stages[0]
        stage = stage.model_copy(
            update={"train": ("embedder.*", "heads.*"), "train_rows": modalities}
        )
        set_trainable(net, stage, "stages.0", "model", toys.vocabulary())
        hold_other_rows(net)
        return net

    net = marked(heads={"tokens": {"kind": "softmax", "tied": False}})
    tables = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert set(tables) == {"embedder.weight", "heads.tokens.weight"}
    assert n_trained(net) == 2 * 16 * (ids.stop - ids.start)
    for p in tables.values():
        (p * 3).sum().backward()
        assert p.grad is not None
        assert torch.equal(p.grad.any(1).nonzero().flatten(), torch.arange(ids.start, ids.stop))
    with pytest.raises(UserError, match=r"^stages\.0\.train_rows: .*'imge'; did you mean 'image'"):
        marked(("imge",))
    with pytest.raises(UserError, match="no table with a row an id trains"):
        marked(embedder={"kind": "by_modality"}, heads={"tokens": {"kind": "embedding"}})
