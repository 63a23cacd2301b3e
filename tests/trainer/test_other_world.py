"""Another number of processes: every optimizer and ZeRO stage goes on, and the probe says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from safetensors.torch import save_file
from test_optimizers import KINDS, optimizer_run, saved
from trainer_runs import losses, make_run, torchrun
from trainer_toys import toys_registered  # noqa: F401

from mm.batch import Batch, Values
from mm.errors import UserError
from mm.hashes import digest
from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import resume_check
from mm.trainer.loop import train

STAGES = [0, 1, 2, 3]
WORLDS = (1, 2, 4, 2, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_law_other_world_sizes_go_on(tmp_path: Path) -> None:
    """1, 2, 4, 2 and 1 processes, two steps each, are as one process all along.

    One launch serves all optimizers and stages.
    """
    wholes = {kind: optimizer_run(tmp_path, f"whole-{kind}", kind, steps=10) for kind in KINDS}
    torchrun(1, list(wholes.values()), timeout_s=300)
    chains: dict[str, list[Run]] = {}
    for i, world in enumerate(WORLDS):
        data = {"micro": 2, "signal_at": 2 * i + 1 if i < len(WORLDS) - 1 else -1}
        for kind in KINDS:
            chains[kind] = [
                optimizer_run(tmp_path, f"{kind}-{s}", kind, steps=10, stage=s, data=data)
                for s in STAGES
            ]
        torchrun(world, [run for runs in chains.values() for run in runs], timeout_s=600)
        for runs in chains.values():
            state = checkpoint.newest(runs[0].folder / "checkpoints").state  # type: ignore[union-attr]
            assert (state["step"], state["world"]) == (2 * i + 2, world)
    for kind, runs in chains.items():
        whole = wholes[kind]
        average = saved(whole, 10, "model.optimizer")["ema/embed.weight"]
        for run in runs:
            assert losses(run) == pytest.approx(losses(whole), rel=2e-5), run.name
            other = saved(run, 10, "model.optimizer")["ema/embed.weight"]
            assert torch.allclose(other, average, rtol=1e-4, atol=1e-5), run.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_law_masters_and_states_are_bit_equal_however_they_are_cut(tmp_path: Path) -> None:
    """4 processes at stage 3, 2 at 1, 1 at 0, 4 at 2 and 2 at 3: no step between, no bit moves."""
    hops = ((4, 3), (2, 1), (1, 0), (4, 2), (2, 3))
    kinds = ("adamw", "sgd_sai", "muon", "lion", "bf16")

    def run_of(kind: str, hop: int) -> Run:
        change = {"engine": {"precision": "bf16"}} if kind == "bf16" else {}
        optimizer = "adamw" if kind == "bf16" else kind
        out = tmp_path / str(hop)
        out.mkdir(exist_ok=True)
        return optimizer_run(out, kind, optimizer, steps=2, stage=hops[hop][1], **change)

    torchrun(4, [run_of(kind, 0) for kind in kinds], timeout_s=400)
    before = {k: checkpoint.newest(run_of(k, 0).folder / "checkpoints") for k in kinds}
    for hop in range(1, len(hops)):
        runs = []
        for kind in kinds:
            run = run_of(kind, hop)
            last = run_of(kind, hop - 1).folder / "checkpoints" / "step_000002"
            shutil.copytree(last, run.folder / "checkpoints" / "step_000002")
            runs.append(run.model_copy(update={"stages": (longer(run.stages[0]),)}))
        beside = lambda run: [str(run.folder / "again")]
        torchrun(hops[hop][0], runs, 400, "reshard_child.py", beside)
        for kind, run in zip(kinds, runs, strict=True):
            root = run.folder / "checkpoints"
            shutil.rmtree(root)
            (run.folder / "again").rename(root)
            stage = run.engine.effective_zero_stage
            assert_only_ranges(run, before[kind], hops[hop][0], stage)
            first, found = before[kind], checkpoint.newest(root)
            assert first is not None and found is not None
            assert found.state["optimizers"] == first.state["optimizers"], (kind, hop)
            for file in ("model", "model.optimizer"):
                one, two = first.tensors(file), found.tensors(file)
                assert one.keys() == two.keys() and len(one) > 2
                for name in one:
                    assert torch.equal(one[name], two[name]), (kind, hop, name)


def assert_only_ranges(run: Run, saved: Any, world: int, stage: int) -> None:
    """A process reads its share of states and masters, and of weights at stage 3; a little more.

    A tensor is cut to the next whole number, and what has no share (a state of a whole tensor, a
    buffer) is read by all.
    """
    total = {f: sum(t.numel() for t in saved.tensors(f).values()) for f in saved.slices.files}
    table = saved.tensors("model")
    buffers = sum(t.numel() for n, t in table.items() if n == "seen")
    share = lambda n: n // (world if stage else 1) + 16 * len(table)
    model = total["model"] - buffers
    masters = share(model) if stage else 0
    weights = share(model) if stage == 3 else model
    for rank in range(world):
        read = json.loads((run.folder / f"read.{rank}.json").read_text())
        assert 0 < read["model"] <= masters + weights + buffers, (world, stage)
        states = total["model.optimizer"]
        whole = sum(t.numel() for n, t in saved.tensors("model.optimizer").items() if t.dim() == 0)
        assert read["model.optimizer"] <= 1.1 * share(states) + whole, (world, stage)


def longer(stage: Any) -> Any:
    return stage.model_copy(update={"budget": stage.budget.model_copy(update={"steps": 9})})


def test_weights_that_changed_on_the_way_are_found_by_the_probe(tmp_path: Path) -> None:
    """A stage of its own cuts the tensors anew too: the kept batch has the loss of the save."""
    change: dict[str, Any] = {"steps": 3, "model": {"dropout": 0.1}, "data": {"micro": 4}}
    run = make_run(tmp_path, stage=1, **change)
    train(run)
    root = run.folder / "checkpoints"
    found = checkpoint.newest(root)
    assert found is not None and found.state["probe"]["losses"].keys() == {"text", "image"}
    assert found.tensors("probe")
    longer = {**change, "steps": 4}
    file = found.folder / "model.safetensors"
    weights = toys.load_file(str(file))
    before = file.read_bytes()

    def put(data: bytes) -> None:
        file.write_bytes(data)
        mark = found.folder / checkpoint.MARK
        hashes = json.loads(mark.read_text())
        mark.write_text(json.dumps(hashes | {file.name: digest(file)}))

    weights["up.weight"] = weights["up.weight"].flip(0)
    save_file(weights, str(tmp_path / "flipped.safetensors"))
    put((tmp_path / "flipped.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"loss/\w+ of the batch kept in it was .* at ZeRO stage 1"):
        train(make_run(tmp_path, stage=0, **longer))
    put(before)
    assert train(make_run(tmp_path, stage=0, **longer))["new_steps"] == 1


def test_any_batch_is_kept_as_json_and_tensors() -> None:
    items = Values.items(torch.rand(2, 3))
    stream = toys.ToyStream(toys.ToyStreamConfig(), toys.vocabulary(), 0, 0, 1)
    batch = stream.next()[0]
    grids = {(2, 2): torch.zeros(1, 4)}
    for b in (batch, Batch.of_values({"image": items}, labels={"y": torch.ones(2)})):
        if b is batch:
            b = replace(b, layout=replace(b.layout, grids=grids), parts={"more": b})
        tensors: dict[str, torch.Tensor] = {}
        tree = json.loads(json.dumps(resume_check._flatten(b, "", tensors)))
        same(b, resume_check._restore(tree, tensors))


def same(a: Any, b: Any) -> None:
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]
    trees = [resume_check._flatten(x, "", t) for x, t in zip((a, b), tensors, strict=True)]
    assert type(a) is type(b) and trees[0] == trees[1]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
