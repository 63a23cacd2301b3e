"""What a network begins with: fresh module by module, of a folder, of a stage before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mm.errors import UserError
from mm.init_from import InitFrom
from mm.model.by_module import build_empty
from mm.model.folder import write_config
from mm.model.model import LmConfig
from mm.objectives.objective import Network
from mm.registry import SURGERIES
from mm.run import Run
from mm.specs import TokenSpec
from mm.trainer import begun
from mm.trainer.begin_weights import fill_cut
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.stage import make_module, weights_of
from mm.trainer.stage_model import run_of
from mm.trainer.trainable import n_trained
from mm.trainer.warm_start import WarmStart, saved_model
from mm.vocabulary import Vocabulary, extend_vocabulary

CPU = torch.device("cpu")
WORDS = extend_vocabulary([TokenSpec("text", 20, fingerprint="t")])
LONGER = extend_vocabulary([TokenSpec("text", 20, fingerprint="t"), TokenSpec("image", 12)])


@pytest.mark.parametrize("given", [(), ("embedder.weight",), ("backbone.norm.weight",)])
def test_what_is_cut_is_whole_before(given: tuple[str, ...]) -> None:
    """Fresh as the seed says, rows of codes upon that, and upon all what the network is given."""
    config = LmConfig.smallest()
    want = dict(make_module(config, WORDS, 3, CPU).named_parameters())
    module = build_empty(lambda: config.build(WORDS), CPU)
    weights = {name: torch.full_like(want[name], 7.0) for name in given}
    seen: dict[str, torch.Tensor] = {}

    def cut(found: dict[str, nn.Parameter]) -> None:
        seen.update({name: p.detach().clone() for name, p in found.items()})

    def prepare() -> None:
        module.embedder.weight[4] = 5.0  # type: ignore[index]

    fill_cut(module, CPU, 3, cut, weights, prepare)  # type: ignore[arg-type]
    want["embedder.weight"].data[4] = 5.0
    assert seen.keys() == want.keys()
    for name, value in seen.items():
        assert torch.equal(value, weights.get(name, want[name])), name


def saved(folder: Path, vocabulary: Vocabulary, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"))
    vocabulary.save(folder / "vocabulary.json")
    return folder


def test_a_network_of_a_folder_is_that_which_the_stage_began_with(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", WORDS, w=torch.ones(2))
    run: Any = SimpleNamespace(vocabulary=Path("words.json"))
    network = Network(mode="frozen", init_from=InitFrom(path=folder))

    def begin(words: Vocabulary, mode: str = "frozen", **state: Any) -> Any:
        before = Snapshot({"stage": 1, **state}, {"model": {}})
        return weights_of(run, 1, before, "teacher", network._replace(mode=mode), words)

    warm = begin(WORDS)
    assert warm.tensors("teacher")["w"].tolist() == [1.0, 1.0] and not warm.has("model")
    line = "^stages.1.objective.teacher: the vocabulary words.json is not that of .*model"
    with pytest.raises(UserError, match=line):
        begin(LONGER)
    assert begin(LONGER, "train").rows == [(slice(0, WORDS.size), slice(0, WORDS.size))]
    assert begin(WORDS, given={"teacher": warm.facts}).facts == warm.facts
    other = {"teacher": {"sha256": "another"}}
    with pytest.raises(UserError, match="teacher: the weights in .* are not those that this run"):
        begin(WORDS, given=other)
    assert begin(WORDS, stage=0, given=other).facts == warm.facts


def test_trained_weights_were_taken_in_no_stage(tmp_path: Path) -> None:
    """Also after an operation: else a stage of that number would go on in the middle of itself."""
    config = LmConfig.smallest()
    module = make_module(config, WORDS, 0, CPU)
    folder = saved(tmp_path / "model", WORDS, **module.state_dict())
    write_config(folder, config.to_dict())
    for surgery in ((), (SURGERIES.get("deepen")(),)):
        warm = WarmStart("init_from", InitFrom(path=folder, surgery=surgery), WORDS)
        assert warm.state["stage"] < 0


def test_what_holds_no_saved_model_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init_from: .*; name a run folder$"):
        saved_model("init_from", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"its training has not ended: mm train it to its end$"):
        saved_model("init_from", tmp_path)


def test_what_networks_began_with_is_a_line_each_of_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Standard output is the command's own; a name in brackets is a name."""
    folder = f"/runs/[bold]/{'deep/' * 20}model"
    told = {"taken": ["a", "b"], "new": ["c[red]"], "left": [], "partial": {}}
    begun.show({"model": {"folder": folder, "step": 7, **told}})
    out, err = capsys.readouterr()
    line = f"init_from: 2 tensors from {folder}, step 7; 1 new: 'c[red]'\n"
    assert (out, err) == ("", line)


def test_elements_that_train_are_counted() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert n_trained(module) == 6


def test_a_stage_has_its_own_mask_or_the_model_s() -> None:
    model = LmConfig(**LmConfig.small, mask="full")
    stages: Any = [SimpleNamespace(mask=None), SimpleNamespace(mask="causal")]
    run = Run.model_construct(name="x", model=model, stages=stages)
    assert run_of(run, 0).model == model
    other = run_of(run, 1)
    assert (other.name, other.model) == ("x", LmConfig(**LmConfig.small, mask="causal"))
    assert run.model == model
