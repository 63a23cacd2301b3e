"""`mm average`: the mean of saved models and of a run's checkpoints, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from generation_toys import VOCABULARY

from mm.cli import main as cli
from mm.model.folder import load_tensors
from mm.model.layer import init_weights
from mm.model.model import Model
from mm.registry import NETWORKS
from mm.trainer.average import average_weights
from mm.trainer.checkpoint.save import Moment, save


def saved(folder: Path, seed: int, **more: object) -> dict[str, torch.Tensor]:
    config = {"kind": "lm", "d_model": 16, "heads": {"tokens": {"kind": "softmax", "tied": True}}}
    net = NETWORKS.parse(config | more).build(VOCABULARY)
    assert isinstance(net, Model)
    torch.manual_seed(seed)
    init_weights(net)
    net.save_pretrained(folder)
    return load_tensors(folder / "model.safetensors")


def test_uniform_decayed_and_given_shares(tmp_path: Path) -> None:
    models = [saved(tmp_path / str(i), i) for i in range(3)]
    sources = [str(tmp_path / str(i)) for i in range(3)]
    decayed = [0.25, 0.25, 0.5]
    cases = {"equal": [1 / 3] * 3, "decay": decayed, "share": [0.25, 0.5, 0.25]}
    options = {"equal": [], "decay": ["--decay", "0.5"]}
    options["share"] = ["--share", "1", "--share", "2", "--share", "1"]
    for name, shares in cases.items():
        out = tmp_path / name
        assert cli.run(["average", *sources, "--out", str(out), *options[name]]) == 0
        found = load_tensors(out / "model.safetensors")
        assert found.keys() == models[0].keys()
        for key, tensor in found.items():
            wanted = sum(s * m[key].double() for s, m in zip(shares, models, strict=True))
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-7, atol=1e-9)
        Model.from_pretrained(out)
    # The recurrence of a moving average that begins as its first source.
    running = 0.0
    for i, x in enumerate((5.0, 2.0, 9.0)):
        running = x if i == 0 else 0.5 * running + 0.5 * x
    assert sum(s * x for s, x in zip(average_weights(3, 0.5), (5.0, 2.0, 9.0), strict=True)) == (
        pytest.approx(running)
    )


def test_one_source_is_itself_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saved(tmp_path / "one", 1)
    saved(tmp_path / "other", 1, d_model=32)
    out = tmp_path / "out"
    assert cli.run(["average", str(tmp_path / "one"), "--out", str(out)]) == 0
    found = load_tensors(out / "model.safetensors")
    assert all(torch.equal(found[k], t) for k, t in one.items())
    both = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert cli.run(["average", *both, "--out", str(tmp_path / "no")]) == 2
    assert "its config is another" in capsys.readouterr().err
    assert cli.run(["average", *both, "--share", "1", "--out", str(tmp_path / "no")]) == 2
    assert "one for each source" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.run(["average", str(tmp_path / "empty"), "--out", str(tmp_path / "no")]) == 2
    assert "no run, no saved model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_checkpoints_of_a_run_whose_head_is_its_table(tmp_path: Path) -> None:
    """A checkpoint has each parameter once; their average is a model that loads."""
    full = saved(tmp_path / "run" / "model", 0)
    for step in (1, 2):
        once = {n: t + step for n, t in full.items() if n != "heads.tokens.weight"}
        moment = Moment.of({"step": step, "stage": 0}, {"model": once})
        save(tmp_path / "run/checkpoints", moment, 9)
    both = [str(tmp_path / f"run/checkpoints/step_{step:06}") for step in (1, 2)]
    mixed = [both[0], str(tmp_path / "run")]
    for out, sources, more in (("both", both, 1.5), ("mixed", mixed, 0.5)):
        assert cli.run(["average", *sources, "--out", str(tmp_path / out)]) == 0
        loaded = Model.from_pretrained(tmp_path / out)
        assert loaded.heads["tokens"].weight is loaded.embedder.weight
        torch.testing.assert_close(loaded.embedder.weight.data, full["embedder.weight"] + more)
