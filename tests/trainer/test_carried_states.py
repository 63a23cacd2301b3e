"""Documents that go on in the next batch: windows join to documents; States are carried, saved."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import token_shards
from thinned import only
from trainer_runs import Calls, losses, resume_bitwise, torchrun

from mm.data.batching.collate import to_batch
from mm.data.batching.document import document_tokens
from mm.data.shards.reader import ShardSet
from mm.data.streams.stateful import StatefulConfig
from mm.errors import UserError
from mm.model.model import Model
from mm.run import Run
from mm.specs import Segment
from mm.trainer.log import metrics
from mm.trainer.loop import Trainer, train
from mm.trainer.stage import make_module

MIXERS = {"attention": {"heads": 2}, "rg_lru": {"heads": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("carried")
    token_shards(root, 37)
    return root


def stream_of(data: Path, **kw: Any) -> StatefulConfig:
    base: dict[str, Any] = {"seq_len": 11, "batch_size": 4, "max_documents": 3, "max_length": 64}
    return StatefulConfig(source={"path": data / "tokens"}, **(base | kw))  # type: ignore[arg-type]


def make_run(root: Path, out: Path, name: str, *, steps: int = 6, **change: Any) -> Run:
    backbone = {"kind": "stack", "mixers": MIXERS, "ffn": {"kind": "swiglu", "hidden": 32}}
    backbone |= {"pattern": change.pop("pattern", "rg_lru attention")}
    stream = {"kind": "stateful", "source": {"path": str(root / "tokens")}, "max_length": 64}
    sizes = {"seq_len": 11, "batch_size": 4, "max_documents": 3}
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": root / "tokens" / "vocabulary.json",
            "model": {"kind": "lm", "d_model": 16, "backbone": backbone}
            | {"mask": change.pop("mask", "causal")},
            "stages": [
                {
                    "data": stream | sizes | change.pop("data", {}),
                    "objective": "next_token",
                    "budget": {"steps": steps},
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                    "schedule": {"shape": "constant", "warmup": 2},
                }
                | change.pop("stage_keys", {})
            ],
            "engine": {"precision": "fp32", "zero_stage": change.pop("stage", 1)},
            "checkpoints": {"every": 2},
            **change,
        }
    )


def test_windows_of_a_row_concatenate_to_its_documents(data: Path) -> None:
    """In the order of the samples, nothing lost; each place predicts the next, once."""
    stream = stream_of(data, micro_batch_size=2).build(seed=3)
    ids, targets, weights = (defaultdict(list) for _ in range(3))
    for _ in range(40):
        for b in stream.next():
            carried = b.labels["row"].tolist()
            assert len(carried) == 2
            for row, number in enumerate(carried):
                n = int((b.layout.fields.document[row] > 0).sum())
                ids[number].append(b.ids[row, :n, 0].numpy())
                targets[number].append(b.targets[row, :n, 0].numpy())
                weights[number].append(b.weight[row, :n].numpy())
            used = (b.layout.cu_seqlens[:-1] < b.ids[..., 0].numel()).sum()
            assert set(b.layout.slot[:used].tolist()) == {0, 1}
    shards = ShardSet.open(data / "tokens")
    vocabulary = shards.vocabulary
    assert vocabulary is not None and set(ids) == {0, 1, 2, 3}
    seen = []
    for row in range(4):
        found = [np.concatenate(each[row]) for each in (ids, targets, weights)]
        at = number = 0
        while at < len(found[0]):
            i = stream._index(number * 4 + row)[1]
            segments = [Segment(m, codes) for m, codes in shards.tokens(i).items()]
            d = document_tokens(segments, vocabulary)
            number += 1
            if len(d.ids) > 64:
                continue
            seen.append(len(d.ids))
            n = min(len(d.ids), len(found[0]) - at)
            for mine, wanted in zip(found, (d.ids, d.targets, d.weights), strict=True):
                assert np.array_equal(mine[at : at + n], wanted[:n]), (row, number)
            at += n
    assert max(seen) > 2 * 11, "some document goes on over two borders"
    stream.close()


@pytest.mark.parametrize("pattern", ["rg_lru attention", "local_attention"])
def test_a_carried_state_is_as_the_whole_document(data: Path, tmp_path: Path, pattern: str) -> None:
    """Frozen weights: nll of every place of a window = that of its document seen whole."""
    run = make_run(data, tmp_path, "whole", pattern=pattern)
    stream = stream_of(data).build(seed=0)
    model = make_module(run.model, stream.vocabulary, 0, torch.device("cpu")).eval()
    assert isinstance(model, Model)
    state, compared = model.initial_state(4, 64), 0
    done: dict[int, list[torch.Tensor]] = defaultdict(list)
    shards = ShardSet.open(data / "tokens")
    for _ in range(12):
        (b,) = stream.next()
        with torch.no_grad():
            out = model(b, state=state)
        state = out.state
        assert state is not None
        nll = torch.zeros(b.weight.numel()).index_put(
            (b.places["tokens"].long(),), out.heads["tokens"].nll
        )
        for row in range(4):
            n = int((b.layout.fields.document[row] > 0).sum())
            done[row].append(nll.view(b.weight.shape)[row, :n])
    for row in range(4):
        found, at = torch.cat(done[row]), 0
        for number in range(100):
            i = stream._index(number * 4 + row)[1]
            segments = [Segment(m, codes) for m, codes in shards.tokens(i).items()]
            whole = to_batch([[segments]], stream.vocabulary)
            n = whole.ids.shape[1]
            if n > 64:
                continue
            if at + n > len(found):
                break
            with torch.no_grad():
                wanted = model(whole).heads["tokens"].nll
            mine = found[at : at + n][whole.places["tokens"].long()]
            assert torch.allclose(mine, wanted, atol=2e-5), (row, number)
            compared, at = compared + 1, at + n
    assert compared > 8
    stream.close()


@pytest.mark.parametrize("stage", only([1, 3], 1))
def test_resume_is_bitwise_with_carried_states(data: Path, tmp_path: Path, stage: int) -> None:
    whole, halves = (make_run(data, tmp_path, name, stage=stage) for name in ("whole", "halves"))
    _, carried = resume_bitwise(whole, halves, files=("model", "carried_states"))
    assert all(len(t) == 4 for t in carried.values()), "one entry a row"


def test_micro_batches_carry_their_own_rows(data: Path, tmp_path: Path) -> None:
    runs = [
        make_run(data, tmp_path, f"m{m}", stage=0, data={"micro_batch_size": m}) for m in (4, 2, 1)
    ]
    for run in runs:
        train(run)
        assert losses(run) == pytest.approx(losses(runs[0]), rel=2e-5)
    fresh = make_run(data, tmp_path, "fresh", stage=0)
    without = lambda trainer: setattr(trainer.stage.nets, "carried", None)
    Trainer(fresh, [Calls("on_stage_start", without)]).fit()
    assert losses(fresh)[0] == pytest.approx(losses(runs[0])[0], rel=2e-5)  # all documents begin
    assert abs(losses(fresh)[3] - losses(runs[0])[3]) > 1e-4, "the States matter"


def test_a_model_without_state_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    values = make_run(data, tmp_path, "no", pattern="fnet", mask="full").to_dict()
    values["model"]["mask"] = "full"
    with pytest.raises(UserError, match=r"'stateful': backbone.layers.0.mixer \(FNet\) has no S"):
        train(Run.model_validate(values))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_carried_states_go_on_with_another_number_of_processes(data: Path, tmp_path: Path) -> None:
    """Two steps each by 1, 2, 4, 2 and 1 processes, at stages 0 and 3: as one process all along."""
    whole = make_run(data, tmp_path, "whole", steps=10)
    train(whole)
    for i, world in enumerate((1, 2, 4, 2, 1)):
        runs = [make_run(data, tmp_path, f"chain{s}", steps=2 * i + 2, stage=s) for s in (0, 3)]
        torchrun(world, runs, timeout_s=600)
    for run in runs:
        assert losses(run) == pytest.approx(losses(whole), rel=2e-5), run.name


def test_a_held_out_loss_carries_states_of_its_own(tmp_path: Path) -> None:
    """Six windows of 11 tokens cost what one of 66 does, and training carries on as without."""
    token_shards(tmp_path / "data", 37, val_share=0.3)
    still = {"optimizer": {"kind": "adamw", "lr": 1e-12, "weight_decay": 0.0}}
    found = []
    for name, seq_len, batches in (("windows", 11, 6), ("whole", 66, 1)):
        run = make_run(
            tmp_path / "data",
            tmp_path,
            name,
            steps=1,
            data={"seq_len": seq_len, "max_documents": 8},
            stage_keys=still | {"eval_every": 1, "eval_batches": batches},
        )
        train(run)
        found.append(metrics.read(run.folder / "metrics.jsonl")[-1])
    for key in ("val/loss", "val/text/loss", "val/image/loss", "val/audio/loss_chance"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5), key
    runs = [
        make_run(tmp_path / "data", tmp_path, f"every{n}", steps=4, stage_keys={"eval_every": n})
        for n in (0, 1)
    ]
    for run in runs:
        train(run)
    assert losses(runs[0]) == losses(runs[1])
