"""The recipes of `configs/finetune/`: each loads and is planned; data of pairs are made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinned import every

from mm.plan.gpus import GPUS
from mm.plan.inputs import Assumed
from mm.plan.plan import Cluster, make_plan
from mm.run import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
# A teacher is another run's saved model; without one it is the student as it begins.
CHANGES = {"distil": ["stages.0.objective.teacher=null"]}


def pairs(root: Path) -> list[str]:
    """Prompts with a better and a worse answer, as token shards; the words that name them."""
    from finetune_toys import call

    source = root / "source"
    source.mkdir()
    for i in range(8):
        for n, text in enumerate((f"how many are {i}?", f"there are {i}", "do not know")):
            (source / f"q{i}.{n:03d}.txt").write_text(text)
    (root / "bytes.yaml").write_text("tokenizer: {kind: bytes, modality: bytes}\n")
    words = root / "tokenizers"
    raw, tokens = root / "raw", root / "tokens"
    assert not call("data", "pack", source, "--segments", "--out", raw)
    tokenizer = ("tokenizer", "train", root / "bytes.yaml", "--data", raw)
    assert not call(*tokenizer, "--out", words / "bytes")
    assert not call("data", "pack", raw, "--tokenizers", words, "--out", tokens)
    return [f"vocabulary={tokens / 'vocabulary.json'}", f"stages.0.data.sources.0.path={tokens}"]


@pytest.mark.parametrize("file", every(2, RECIPES), ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_loads_and_is_planned(file: Path, tmp_path: Path) -> None:
    changes, assumed = CHANGES.get(file.stem, []), Assumed(64, 1000)
    if file.stem == "preferences":
        changes, assumed = pairs(tmp_path), None
    run = Run.load(file, changes)
    for stage in range(len(run.stages)):
        plan = make_plan(
            run, Cluster(GPUS["h100"], 1, 1), index=stage, assumed=assumed,
            longest=False, variants=False,
        )  # fmt: skip
        assert plan["fits"] and plan["step"]["seconds"] > 0


def test_there_are_recipes() -> None:
    names = {file.stem for file in RECIPES}
    assert {"speech-recognition", "image-classes", "chat", "preferences", "distil"} <= names
