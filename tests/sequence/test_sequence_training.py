"""`engine.sequence` in training: losses, held-out losses and gradients are those of one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trainer_toys as toys
from trainer_runs import losses, make_run, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.launch.batch import batch_arithmetic
from mm.plan.inputs import Assumed, Subject, documents
from mm.plan.trace import Trace
from mm.run import Run
from mm.trainer.loop import train
from mm.trainer.stage import build

HYBRID = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {
        "kind": "stack",
        "pattern": "attention delta_rule rg_lru linear_attention",
        "depth": 4,
        "ffn": {"kind": "rwkv_ffn", "hidden": 16},
        "mixers": {"attention": {"heads": 2}, "linear_attention": {"heads": 2}},
    },
}


def run_of(out: Path, name: str, **change: Any) -> Run:
    change["engine"] = {"sequence": 2} | change.get("engine", {})
    keys = {"eval_every": 3, "eval_batches": 2}
    return make_run(
        out,
        name,
        model=change.pop("model", HYBRID),
        stage_keys=keys,
        data={"micro": 4} | change.pop("data", {}),
        **change,
    )


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """ONE torchrun of two processes that share all rows; all stages: test_sequence_verify.py."""
    out = tmp_path_factory.mktemp("sequence")
    runs = {"stage3": run_of(out, "stage3", stage=3)}
    runs["half"] = run_of(out, "half", stage=2, data={"signal_at": 2})
    os.environ["WANDB_MODE"] = "disabled"
    torchrun(2, list(runs.values()))
    return runs


@pytest.mark.slow
def test_two_slices_have_the_losses_of_one_process(in_two: dict[str, Run], tmp_path: Path) -> None:
    alone = run_of(tmp_path, "alone", engine={"sequence": 1})
    train(alone)
    keys = ("loss/total", "loss/text", "val/loss", "optim/grad_norm")
    run = in_two["stage3"]
    for key in keys:
        assert losses(run, key) == pytest.approx(losses(alone, key), rel=1e-5), key
    # What processes share counts once.
    shares = "tokens/text_share"
    assert losses(run, shares) == losses(alone, shares)


@pytest.mark.slow
def test_a_run_goes_on_with_whole_rows_in_one_process(
    in_two: dict[str, Run], tmp_path: Path
) -> None:
    """Stopped by a signal after 3 steps; the loss of the batch that is kept with it is checked."""
    half = in_two["half"]
    assert len(losses(half)) == 3
    train(Run.model_validate(half.to_dict() | {"engine": {"precision": "fp32", "zero_stage": 1}}))
    alone = run_of(tmp_path, "alone", engine={"sequence": 1})
    train(alone)
    assert losses(half) == pytest.approx(losses(alone), rel=1e-5)


REFUSED = {
    "a recurrence without a parallel form": (
        {"model": HYBRID | {"backbone": {"kind": "stack", "pattern": "attention gru"}}},
        r"backbone.layers.1.mixer: gru cannot share the tokens of a row",
    ),
    "heads that do not divide": (
        {
            "model": HYBRID
            | {"backbone": {"kind": "stack", "mixers": {"attention": {"heads": 3, "head_dim": 4}}}}
        },
        r"layers.0.mixer: 3 heads, 3 of keys, do not divide .* possible: \[1, 3\]",
    ),
    "a compiled model": ({"engine": {"sequence": 2, "compile": True}}, "engine.compile"),
    "no language model": ({"model": {"kind": "toy_lm"}}, "network 'model' is no language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_before_the_first_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm.trainer import sequence

    change, said = REFUSED[case]
    # One process is told that it is half of two: what is refused is so before anything is sent.
    monkeypatch.setattr(sequence, "data_ranks", lambda size: sequence.environment.ranks())
    monkeypatch.setattr(sequence.SequenceGroup, "join", lambda size: None)
    run = run_of(tmp_path, "refused", **change)
    with pytest.raises(UserError, match=f"engine.sequence 2: .*{said}.*; or set engine.sequence=1"):
        train(run)
    assert not (run.folder / "metrics.jsonl").exists()


def test_one_process_is_no_group_of_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine.sequence 2 does not divide 1 processes"):
        train(run_of(tmp_path, "alone"))


def test_the_arithmetic_of_the_batch_counts_groups(tmp_path: Path) -> None:
    run = run_of(tmp_path, "run")
    run = run.model_copy(update={"stages": (run.stages[0].model_copy(update={"data": _Rows()}),)})
    assert "4 rows a micro-batch x 1 accumulated x 2 groups of 2 processes" in " ".join(
        batch_arithmetic(run, 4)
    )
    with pytest.raises(
        UserError,
        match="engine.sequence 2 does not divide 3 .*; start 2 or 4: torchrun --nproc_per_node 4 ",
    ):
        batch_arithmetic(run, 3)


def test_a_plan_counts_what_slices_hold_and_pass(tmp_path: Path) -> None:
    """Half the activations of a row; heads grow with it, states do not."""

    def planned(size: int, length: int = 24) -> Trace:
        run = run_of(tmp_path, "run", engine={"sequence": size, "zero_stage": 2})
        words = toys.vocabulary()
        subject = Subject(run, 0, build(run.stages[0].objective, vocabulary=words), words, "fp32",
                          Assumed(length))  # fmt: skip
        return subject.trace(documents(4, length, length, words), 2)[0]

    whole, half = planned(1), planned(2)
    assert half.tokens * 2 == whole.tokens and not whole.passed
    assert 0.45 < half.forward_peak / whole.forward_peak < 0.65
    # Of 4 rows, 12 tokens, 2 heads of 8: q, k, v and y, forward and backward, in 4 bytes.
    assert half.passed["heads"] == 2 * 4 * (4 * 12 * 16) * 4
    longer = planned(2, 48)
    assert longer.passed["heads"] == 2 * half.passed["heads"]
    assert longer.passed["states"] == half.passed["states"] > 0


class _Rows:
    kind, batch_size, micro_batch_size, seq_len = "packed", 8, None, 12
