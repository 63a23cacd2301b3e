"""Codebooks in one place, from files through every stream to a run: they resume, and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import ToyTokenizer, wav
from trainer_runs import resume_bitwise, rows

from mm.batch import Batch
from mm.data.pack.job import pack
from mm.errors import UserError
from mm.registry import STREAMS
from mm.run import Run
from mm.specs import Encoded
from mm.trainer.loop import train

ASK = {"kind": "any_to_any", "tasks": {"text>audio": 1.0, "audio>text": 1.0, "text": 1.0}}
DELAYS = {"parallel": [0, 1, 2], "depth": [0, 0, 0]}


class ToyCodec(ToyTokenizer):
    """Three codebooks of five codes from the samples of a wave."""

    def _one(self, raw: Any) -> Encoded:
        level = (np.abs(np.asarray(raw.samples)[::40]) * 100).astype(np.int32)
        books = [(level // (q + 1)) % 5 + 5 * q for q in range(3)]
        return Encoded(np.stack(books, 1).reshape(-1).astype(np.int32))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("codes")
    source = root / "source"
    source.mkdir()
    for i in range(20):
        (source / f"{i:02d}.wav").write_bytes(wav(i, 200 + 80 * (i % 3)))
        (source / f"{i:02d}.txt").write_text(f"{i} " * (1 + i % 3))
    made = {"audio": ToyCodec("audio", 5, 3), "text": ToyTokenizer("text", 64)}
    settings: Any = {"tokenizers": made, "progress": False, "val_share": 0.2}
    pack(source, root / "tokens", **settings)
    return root / "tokens"


def stream(data: Path, kind: str, delays: list[int], rank: int = 0, world: int = 1) -> Any:
    sizes: dict[str, Any] = {
        "packed": {"seq_len": 64, "max_documents": 6},
        "bucketed": {"buckets": 2},
        "stateful": {"seq_len": 12, "max_documents": 4, "max_length": 96},
    }[kind]
    transform = [ASK, {"kind": "delay", "delays": {"audio": delays}}]
    given = {"kind": kind, "batch_size": 2, "prefetch": 0, "transform": transform, **sizes}
    given |= {"sources" if kind == "packed" else "source": {"path": str(data)}}
    given |= {"sources": [given["sources"]]} if kind == "packed" else {}
    return STREAMS.parse(given).build(rank=rank, world=world)


@pytest.mark.parametrize("kind", ["packed", "bucketed", "stateful"])
def test_every_stream_carries_it_and_resumes(data: Path, kind: str) -> None:
    one = stream(data, kind, DELAYS["parallel"])
    seen, state = list[Batch](), None
    for step in range(6):
        if step == 3:
            state = one.state_dict()
        seen += one.next()
    assert all(b.ids.shape[-1] == 3 and "codes" in b.places for b in seen)
    assert sum(len(b.places["codes"]) for b in seen) > 0
    again = stream(data, kind, DELAYS["parallel"])
    assert state is not None
    again.load_state_dict(state)
    for b in seen[3:]:
        (other,) = again.next()
        assert torch.equal(b.ids, other.ids) and torch.equal(b.targets, other.targets)
        assert torch.equal(b.places["codes"], other.places["codes"])
    halves = [stream(data, kind, DELAYS["parallel"], rank, 2) for rank in range(2)]
    ids = [each.next()[0].ids for each in halves]
    if kind != "bucketed":
        assert torch.equal(torch.cat(ids), seen[0].ids)


def make_run(data: Path, out: Path, name: str, head: str, **change: Any) -> Run:
    delays = {"audio": DELAYS[head]}
    small = {"width": 8, "backbone": {"kind": "stack", "depth": 1, "pattern": "attention"}}
    codes = {"kind": head, "delays": delays, **(small if head == "depth" else {})}
    given: dict[str, Any] = {
        "name": name,
        "out": str(out),
        "vocabulary": str(data / "vocabulary.json"),
        "model": {
            "kind": "lm",
            "d_model": 16,
            "backbone": {"kind": "stack", "depth": 2, "pattern": "attention rg_lru",
                         "mixers": {"rg_lru": {"heads": 2}, "attention": {"heads": 2}}},
            "heads": {"tokens": "softmax", "codes": codes},
        },
        "stages": [
            {
                "data": {
                    "kind": "packed",
                    "seq_len": 64,
                    "batch_size": 2,
                    "max_documents": 6,
                    "transform": [ASK, {"kind": "delay", "delays": delays}],
                    "sources": [{"path": str(data)}],
                },
                "objective": "next_token",
                "budget": {"steps": 6},
                "optimizer": {"kind": "adamw", "lr": 1e-2},
            }
        ],
        "engine": {"precision": "fp32", "zero_stage": 0},
        "checkpoints": {"every": 2},
    }  # fmt: skip
    for key, value in change.items():
        at, *rest = key.split("__")
        node: Any = given
        while rest:
            node = node[int(at) if at.isdigit() else at]
            at, *rest = rest
        node[at] = value
    return Run.model_validate(given)


@pytest.mark.slow
@pytest.mark.parametrize("head,stage", [("parallel", 0), ("depth", 3)])
def test_resume_is_bitwise(data: Path, tmp_path: Path, head: str, stage: int) -> None:
    engine = {"precision": "fp32", "zero_stage": stage}
    make = lambda name: make_run(data, tmp_path, name, head, engine=engine)
    whole = make("whole")
    resume_bitwise(whole, make("halves"))
    held_out = [row for row in rows(whole) if "val/audio/loss" in row]
    assert held_out and held_out[-1]["val/audio/loss_chance"] < np.log(6)
    assert held_out[-1]["val/audio/loss_chance"] > np.log(5)


def test_what_does_not_fit_the_model_is_refused_before_step_one(data: Path, tmp_path: Path) -> None:
    run = lambda **change: make_run(data, tmp_path, "none", "parallel", **change)
    other = [ASK, {"kind": "delay", "delays": {"audio": [0, 2, 4]}}]
    with pytest.raises(
        UserError, match=r"'audio' is laid out with delays \[0, 2, 4\], model.heads"
    ):
        train(run(stages__0__data__transform=other))
    with pytest.raises(UserError, match="'audio' is laid out with delays none, model.heads.codes"):
        train(run(stages__0__data__transform=[ASK]))
    with pytest.raises(UserError, match="model.heads.codes says none: set both alike"):
        train(run(model__heads={"tokens": "softmax"}))
    short = [ASK, {"kind": "delay", "delays": {"audio": [0, 1]}}]
    with pytest.raises(UserError, match="'audio' has 3 codebooks, and delays.audio names 2"):
        train(run(stages__0__data__transform=short))
    with pytest.raises(UserError, match="objective: it learns one id a place, and the transform"):
        train(run(stages__0__objective="masked"))
