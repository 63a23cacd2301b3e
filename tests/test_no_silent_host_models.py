"""Law `no silent host` of whole models: what every YAML of `configs/` trains, on fake CUDA tensors.

The trainer's own optimizer step without DeepSpeed, which may read the device once a network, then a
prefill and a decoding step, which may not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import ROOT
from thinned import every

from mm import config as yaml_config
from mm.batch import Batch, Values
from mm.decoders.generate import stream_tokens
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.backbones.stack import presets
from mm.plan.fake_cuda import CUDA, Reads, fake_cuda
from mm.plan.fake_step import build_stage, train_step
from mm.plan.inputs import documents
from mm.plan.launches import one_of_each
from mm.registry import BACKBONES
from mm.run import Run
from mm.specs import Segment, TokenSpec
from mm.vocabulary import Vocabulary, extend_vocabulary

GIVEN = {"prefix": [1, 1, 0, 0, 0]}
PREFILL = Layout.from_rows(
    [[Doc(5, extra=GIVEN, slot=0)], [Doc(3, extra={"prefix": [1, 0, 0]}, slot=1)]], 5
)
STEP = Layout.from_rows([[Doc(1, slot=i, fresh=False, start=5)] for i in range(2)], 1)
THE_READ = "mm/trainer/step.py:"


def runs() -> list[str]:
    """Every run that is another than its base alone, by its file."""
    read = {f: yaml_config.read(f) for f in sorted((ROOT / "configs").rglob("*.yaml"))}
    found: dict[str, str] = {}
    for file, values in read.items():
        if "stages" in values:
            found.setdefault(str((values["model"], values["stages"])), str(file.relative_to(ROOT)))
    return sorted(found.values())


def backbones() -> list[str]:
    return sorted(p.stem for p in (ROOT / "configs" / "backbone").glob("*.yaml"))


def with_backbone(run: Run, backbone: Any) -> Run:
    if backbone is None:
        return run
    model = run.model.model_copy(update={"backbone": backbone})
    return run.model_copy(update={"model": model})


def smallest(run: Run) -> Run:
    return with_backbone(run, one_of_each(getattr(run.model, "backbone", None)))


def words_of(run: Run) -> Vocabulary | None:
    if run.vocabulary is None:
        return None
    codes = getattr(run.model, "heads", {}).get("codes")
    books = {m: len(each) for m, each in getattr(codes, "delays", {}).items()}
    specs = [TokenSpec(m, 20, books.get(m, 1), fingerprint=m) for m in run.tokenizers]
    return extend_vocabulary(specs)


def batch_of(run: Run, index: int, vocabulary: Vocabulary | None) -> Batch:
    """Documents of ids, or raw items of the stage's modality."""
    if vocabulary is not None:
        batch = documents(2, 24, 12, vocabulary, getattr(run.model, "heads", {}))
        given = lambda f: f._replace(extra={"prefix": (f.position[..., 0] < 4).int()})
        batch = dataclasses.replace(batch, layout=batch.layout.map_fields(given))
        other = getattr(run.stages[index].objective, "rejected", None)
        return dataclasses.replace(batch, parts={other: batch} if other else {})
    data: Any = run.stages[index].data
    model: Any = run.model
    if data.modality == "image":
        shape = (2, model.channels, data.size, data.size)
    else:
        shape = (2, int(data.crop_seconds * data.sample_rate))
    return Batch.of_values({data.modality: Values.items(torch.rand(shape))})


def without_folders(run: Run) -> Run:
    """The same with a copy of the model where the run reads one that another run has trained."""
    of = lambda s: s.objective
    alone = {"teacher": None}
    stages = [
        s.model_copy(update={"objective": of(s).model_copy(update=alone)})
        if getattr(of(s), "teacher", None)
        else s
        for s in run.stages
    ]
    return run.model_copy(update={"stages": tuple(stages), "init_from": None})


def hold_the_law(run: Run, micro_batches: int = 1) -> None:
    run = without_folders(run)
    for index in range(len(run.stages)):
        vocabulary = words_of(run)
        micros = [batch_of(run, index, vocabulary) for _ in range(micro_batches)]
        with fake_cuda() as reads:
            stage = build_stage(run, index, vocabulary)
            asked: Any = getattr(stage.objective, "config", None)
            critic = getattr(asked, "adversarial", None)
            late = [critic.start_step] if critic else []
            for step in late or [0]:
                found = train_step(reads, stage, step, micros, vocabulary)
                assert all(place.startswith(THE_READ) for place in found), found
                assert len(found) == len(stage.engines), found
                for engine in stage.engines.values():
                    untouched = [n for n, p in engine.trainable() if p not in engine.base.state]
                    assert untouched == [], "no gradient reached them"
            decode(stage.engines["model"].raw, reads)


def decode(model: Any, reads: Reads) -> None:
    """A prefill and a step, where the model has a State."""
    reads.places.clear()
    if not hasattr(model, "initial_state") or "tokens" not in model.heads:
        return
    try:
        state = model.eval().initial_state(2, 16)
    except UserError:  # it mixes both ways
        return
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for layout in (PREFILL, STEP):
            ids = torch.full((*layout.shape, 1), 20, dtype=torch.int32, device=CUDA)
            last = torch.tensor([layout.shape[1] - 1, 2 * layout.shape[1] - 1], dtype=torch.int32)
            batch = Batch.of_ids(ids, layout.to(CUDA))
            batch = dataclasses.replace(batch, places={"tokens": last.to(CUDA)})
            out = model(batch, state=state, heads=("tokens",), loss=False)
            state = out.state
    assert out.heads["tokens"].dist.logits.device.type == "cuda"
    assert reads.places == []


@pytest.mark.parametrize("file", every(3, runs()[::3]))
def test_no_run_asks_the_device(file: str) -> None:
    hold_the_law(smallest(Run.load(ROOT / file)))


@pytest.mark.slow
@pytest.mark.parametrize("file", runs())
def test_no_whole_run_asks_the_device(file: str) -> None:
    hold_the_law(Run.load(ROOT / file), micro_batches=2)


QUICKSTART = Path("configs/quickstart/backbone.yaml")


@pytest.mark.parametrize("name", every(3, backbones()))
def test_no_backbone_asks_the_device(name: str) -> None:
    backbone = BACKBONES.parse(yaml_config.read(ROOT / "configs" / "backbone" / f"{name}.yaml"))
    hold_the_law(with_backbone(Run.load(ROOT / QUICKSTART), one_of_each(backbone)))


def test_a_mask_of_fields_asks_no_device() -> None:
    run = smallest(Run.load(ROOT / QUICKSTART, ["model.mask=causal | (same_item & prefix)"]))
    hold_the_law(run)


@pytest.mark.slow
@pytest.mark.parametrize("word", presets())
def test_no_model_of_a_preset_asks_the_device(word: str) -> None:
    ffn = {"kind": "swiglu", "hidden": 32}
    backbone = BACKBONES.parse({"kind": "stack", "pattern": word, "ffn": ffn})
    run = with_backbone(Run.load(ROOT / QUICKSTART), backbone)
    if yaml_config.read(f"mixer/{word}").get("kind") == "plstm":
        run = run.model_copy(update={"model": run.model.model_copy(update={"mask": "full"})})
    hold_the_law(run)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_reads_the_device_once_a_token(temperature: float, cfg_scale: float) -> None:
    """Sampled and greedy, with and without guidance; sequences of unlike lengths drop out."""
    run = smallest(Run.load(ROOT / QUICKSTART))
    vocabulary = words_of(run)
    assert vocabulary is not None
    prompts = [[Segment("text", np.arange(n, dtype=np.int32), role="target")] for n in (3, 5, 9, 9)]
    with fake_cuda() as reads:
        model = build_stage(run, 0, vocabulary).engines["model"].raw
        reads.places.clear()
        settings: Any = {"temperature": temperature, "cfg_scale": cfg_scale, "max_tokens": 6}
        if temperature:
            settings |= {"top_k": 5, "top_p": 0.9}
        steps = list(stream_tokens(model, vocabulary, prompts, "text", **settings))
    assert len(steps) == len(reads.places) == 6, reads.places
    assert all(place.startswith("mm/decoders/ar.py:") for place in reads.places), reads.places


@pytest.mark.parametrize("name", ["delay", "depth"])
def test_codebooks_that_share_a_place_are_read_once_a_place(name: str) -> None:
    """All of them together, sampled under guidance."""
    run = smallest(Run.load(ROOT / f"configs/members/{name}.yaml"))
    vocabulary = words_of(run)
    assert vocabulary is not None
    prompts = [[Segment("text", np.arange(n, dtype=np.int32), role="condition")] for n in (3, 5)]
    with fake_cuda() as reads:
        model = build_stage(run, 0, vocabulary).engines["model"].raw
        reads.places.clear()
        settings: Any = {"temperature": 0.7, "top_k": 5, "cfg_scale": 2.0, "max_tokens": 12}
        steps = list(stream_tokens(model, vocabulary, prompts, "audio", **settings))
    assert len(steps) == len(reads.places) > 1, reads.places
    assert all(place.startswith("mm/decoders/ar.py:") for place in reads.places), reads.places


def test_the_law_sees_a_read_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.trainer import step as trainer_step

    real = trainer_step._device_metrics
    asks = lambda term, metrics, total, n: (float(total), real(term, metrics, total, n))[1]
    monkeypatch.setattr(trainer_step, "_device_metrics", asks)
    with pytest.raises(AssertionError, match="test_no_silent_host_models.py:.* a value"):
        hold_the_law(smallest(Run.load(ROOT / QUICKSTART)))
