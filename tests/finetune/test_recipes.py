"""The recipes of `configs/finetune/`: each is planned, and trained as it stands for a few steps.

They name folders; data of their kinds are made there, with small tokenizers that were not trained.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_toys import jsonl
from data_toys import png, wav
from finetune_toys import call
from start_toys import image_tokenizer
from thinned import every

from mm.data.pack.job import pack
from mm.model.folder import load_tensors
from mm.model.layer import init_weights
from mm.plan.inputs import Assumed
from mm.plan.plan import Cluster, make_plan
from mm.run import Run
from mm.tokenizers.audio.codec import AudioCodecConfig
from mm.tokenizers.text.bpe import BpeConfig
from mm.trainer.data_sheets import GPUS
from mm.trainer.log import metrics
from mm.trainer.loop import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "finetune").glob("*.yaml"))
NAMES = [file.stem for file in RECIPES]
STEPS = 4
WORDS, MODALITIES = ("cat", "dog"), ("text", "image", "audio")
# What of a recipe costs a loss, by names of the metrics; what it says of the rest is not learnt.
LOSSES = {
    "chat": {"text"},
    "distil": {"text", "distil_text"},
    "distil-hybrid": {"hidden"} | {f"{d}{m}" for d in ("", "distil_") for m in MODALITIES},
    "image-captions": {"text"},
    "image-classes": {"text"},
    "new-modality": {"text", "image"},
    "preferences": {"dpo", "nll", "accuracy", "margin"},
    "speech-recognition": {"text"},
    "text-to-speech": {"audio"},
    "vision-instruction": {"text"},
}
SMALL = ("model.d_model=32", "tracking.sinks=[]", "callbacks=[]", "evaluate=false")


def changes(n_stages: int, steps: int = STEPS) -> list[str]:
    """What a test cannot wait for."""
    each = ("data.batch_size=2", f"budget.steps={steps}", "schedule.warmup=1", "tasks=[]")
    return [*SMALL, *(f"stages.{i}.{change}" for i in range(n_stages) for change in each)]


def tokenizers(root: Path) -> Path:
    BpeConfig(vocab_size=300).fit(["a cat 1, a dog 2: is it?"] * 3).save(root / "text")
    image_tokenizer(root / "image")
    torch.manual_seed(0)
    codec = AudioCodecConfig.smallest().build()
    init_weights(codec)
    codec.save_pretrained(root / "audio")
    return root


def samples(folder: Path) -> None:
    for split, n in (("train", 24), ("val", 6), ("test", 6)):
        (folder / split).mkdir(parents=True)
        for i in range(n):
            stem = folder / split / f"{split}{i:03d}"
            stem.with_suffix(".png").write_bytes(png(i))
            stem.with_suffix(".wav").write_bytes(wav(i, 800))
            stem.with_suffix(".txt").write_text(f"a {WORDS[i % 2]} {i}")


def talks(root: Path, *, pictures: bool) -> Path:
    rows = []
    for i in range(24):
        asked: list[Any] = [{"type": "text", "text": f"is it a dog, {i}?"}]
        if pictures:
            url = "data:image/png;base64," + base64.b64encode(png(i)).decode()
            asked.insert(0, {"type": "image_url", "image_url": {"url": url}})
        said = f"a {WORDS[i % 2]}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages})
    return jsonl(root / f"talks{pictures}.jsonl", rows)


def pairs(folder: Path) -> Path:
    """A third of the answers are texts, pictures and recordings each."""
    folder.mkdir()
    for i in range(18):
        (folder / f"q{i}.000.txt").write_text(f"show {i}")
        for n in (1, 2):
            made = {"txt": f"a dog {n * i}".encode(), "png": png(n * i), "wav": wav(n * i, 800)}
            ending, data = list(made.items())[i % 3]
            (folder / f"q{i}.{n:03d}.{ending}").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/`` as the recipes name it: bases of two steps, and data packed with their ids."""
    root = tmp_path_factory.mktemp("recipes")
    runs, quiet = root / "runs", {"progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("WANDB_MODE", "disabled")
        samples(root / "raw")
        words = tokenizers(runs / "quickstart" / "tokenizers")
        data, ids = runs / "quickstart" / "data", runs / "quickstart" / "tokens"
        pack(root / "raw", data / "digits", **quiet)
        pack(data / "digits", ids / "digits", tokenizers=words, **quiet)
        as_before = {"tokenizers": words, "vocabulary": ids / "digits" / "vocabulary.json", **quiet}
        shutil.copytree(ids / "digits", ids / "text")
        for name in ("speaker", "pictures", "captions", "new"):
            shutil.copytree(data / "digits", runs / name / "data")
            pack(runs / name / "data", runs / name / "tokens", **as_before)
        for name, pictures in (("talks", False), ("looks", True)):
            src = talks(root, pictures=pictures)
            pack(src, runs / name / "tokens", val_share=0.2, **as_before)
        pack(pairs(root / "pairs"), root / "paired", segments=True, **quiet)
        paired = pack(root / "paired", runs / "pairs" / "tokens", **as_before)
        assert {m: paired.modalities[m] for m in MODALITIES} == {"text": 18, "image": 6, "audio": 6}
        for name, config in (("quickstart", "hybrid"), ("attention", "backbone")):
            train(base(config, name))
        old(root, words)
    return root


def base(config: str, name: str, *more: str) -> Run:
    """A base of two steps."""
    given = [*changes(1, 2), f"name={name}", "checkpoints.every=0", *more]
    return Run.load(CONFIGS / "quickstart" / f"{config}.yaml", given)


def old(root: Path, words: Path) -> None:
    """A base without pictures, and new data in its ids with pictures behind them."""
    runs = root / "runs"
    known, all_ids = runs / "old" / "tokenizers", runs / "new" / "tokens"
    for name in ("text", "audio"):
        shutil.copytree(words / name, known / name)
    data = runs / "new" / "data"
    pack(data, runs / "old" / "tokens", tokenizers=known, progress=False)
    vocabulary = runs / "old" / "tokens" / "vocabulary.json"
    given = [
        f"vocabulary={vocabulary}",
        f"stages.0.data.sources=[{{path: {vocabulary.parent}}}]",
        "stages.0.objective.transform={kind: any_to_any, tasks: {audio>text: 1.0, text: 1.0}}",
    ]
    tokenizers = ", ".join(f"{name}: {known / name}" for name in ("text", "audio"))
    train(base("hybrid", "old", *given, f"tokenizers={{{tokenizers}}}"))
    shutil.rmtree(all_ids)
    pack(data, all_ids, tokenizers=words, vocabulary=vocabulary, progress=False)


@pytest.fixture
def inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name: str, inside: Path) -> None:
    file = CONFIGS / "finetune" / f"{name}.yaml"
    n = len(Run.load(file, []).stages)
    teacher = {"distil": ["stages.0.objective.teacher=runs/quickstart"]}.get(name, [])
    given = [*changes(n), *teacher]
    if name == "new-modality":
        given.remove("stages.1.tasks=[]")
        given += [f"checkpoints.every={STEPS}", "checkpoints.keep_last=9"]
    run = Run.load(file, given)
    train(run)
    rows = metrics.read(run.folder / "metrics.jsonl")
    losses = [{k: v for k, v in row.items() if k.startswith("loss/")} for row in rows]
    losses = [found for found in losses if found]
    assert len(losses) == n * STEPS
    costs = {k.removeprefix("loss/") for found in losses for k in found} - {"total"}
    assert costs == LOSSES[name]
    if name == "new-modality":  # new rows alone moved at first; and what was forgotten
        old = load_tensors(Path("runs/old/model/model.safetensors"))
        warm = load_tensors(run.folder / f"checkpoints/step_{STEPS:06d}/model.safetensors")
        off = [k for k, t in old.items() if not torch.equal(warm[k][: len(t)], t)]
        assert off == []
        tables = {k: len(t) for k, t in old.items() if len(warm[k]) > len(t)}
        assert tables and all((warm[k][n:] != old[k].mean(0)).any() for k, n in tables.items())
        figures = []
        for other in ([], ["--model", "runs/old"]):
            assert not call("eval", run.folder, *other, "--json", "figures.json")
            figures.append(json.loads(Path("figures.json").read_text())["figures"])
        of = [{f["name"] for f in found if f["task"] == "old"} for found in figures]
        assert of == [{"text_perplexity", "audio_perplexity"}] * 2
    if name == "distil-hybrid":  # first what layers hold, then what is said of targets
        assert [("loss/hidden" in found) for found in losses] == [True] * STEPS + [False] * STEPS
        assert losses[STEPS - 1]["loss/hidden"] < losses[0]["loss/hidden"]


def test_there_are_recipes() -> None:
    assert set(NAMES) == LOSSES.keys()
    page = (ROOT / "docs" / "finetune.md").read_text()
    assert all(f"`configs/finetune/{name}.yaml`" in page for name in NAMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", every(5, sorted(set(NAMES) - {"preferences"})))
def test_a_recipe_is_planned_at_its_size(name: str) -> None:
    is_planned(name, Assumed(64, 1000))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pairs_are_planned_by_their_data(inside: Path) -> None:
    is_planned("preferences", None)


def is_planned(name: str, assumed: Assumed | None) -> None:
    file = CONFIGS / "finetune" / f"{name}.yaml"
    n = len(Run.load(file, []).stages)
    alone = [f"stages.{i}.objective.teacher=null" for i in range(n)]
    run = Run.load(file, alone if name.startswith("distil") else [])
    for stage in range(n):
        plan = make_plan(
            run, Cluster(GPUS["h100"], 1, 1), index=stage, assumed=assumed,
            longest=False, variants=False,
        )  # fmt: skip
        assert plan["fits"] and plan["step"]["seconds"] > 0
