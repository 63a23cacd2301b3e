"""Adapters in PEFT's format: out to it and in from it, with the logits of both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checkpoints import checkpoint
from safetensors.torch import load_file, save_file

from mm.cli import main as cli
from mm.errors import UserError
from mm.init_from import InitFrom
from mm.interchange.adapter import export_adapter, import_adapter, read_model
from mm.interchange.check import logits_of
from mm.interchange.peft import with_adapters
from mm.interchange.read import import_model
from mm.model import folder as files
from mm.model.linears.dense import DenseConfig
from mm.model.linears.lora import Lora, LoraConfig, loras_in, merge_adapters, unmerge_adapters
from mm.model.model import Model
from mm.surgery.base import Operated, network_of
from mm.trainer.warm_start import WarmStart

PROBE = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(5))
SETTINGS = {
    "plain": {"rank": 3, "alpha": 5.0, "targets": ["qkv", "out"]},
    "rs": {"rank": 4, "rs": True},
    "dora": {"rank": 2, "dora": True, "targets": ["qkv", "gate_up"]},
}


def base(folder: Path, case: str = "llama", **more: Any) -> tuple[Path, Path]:
    theirs = checkpoint(folder / "theirs", case, **more)
    import_model(theirs, folder / "mine", check=False)
    return theirs, folder / "mine"


def tuned(mine: Path, out: Path, **lora: Any) -> Path:
    """A saved model with adapters that are not nothing."""
    lm, tensors, vocabulary = read_model(mine)
    config = with_adapters(lm, **lora)
    with torch.device("meta"):
        own = config.build(vocabulary).state_dict()
    below = lambda name: ".base.".join(name.rsplit(".", 1))
    named = {k if k in own else below(k): t for k, t in tensors.items()}
    module = network_of(Operated(config, named, vocabulary))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in loras_in(module):
            part._measure()
            for name in part.adapter_parameters:
                p = getattr(part, name)
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    places = {"text": mine / "tokenizers/text"}
    files.save_model(out, config.to_dict(), module.state_dict(), vocabulary, places)
    return out


def by_hand(theirs: Path, adapter: Path) -> torch.Tensor:
    """Logits of `transformers` with W + s B A (each row at DoRA's length) in place of W."""
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    given = load_file(adapter / "adapter_model.safetensors")
    for key, a in given.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        b = given[f"{path}.lora_B.weight"]
        name = path.removeprefix("base_model.model.")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scale = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))
        weight = peer.get_submodule(name).weight
        turned = config["fan_in_fan_out"]
        with torch.no_grad():
            whole = (weight.T if turned else weight) + scale * (b @ a)
            if config["use_dora"]:
                whole *= (given[f"{path}.lora_magnitude_vector"] / whole.norm(dim=1))[:, None]
            weight.copy_(whole.T if turned else whole)
    with torch.no_grad():
        return peer(input_ids=PROBE).logits


@torch.no_grad()
def ours(folder: Path) -> torch.Tensor:
    return logits_of(Model.from_pretrained(folder), PROBE)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_exported_adapters_give_the_same_logits_and_come_back(
    tmp_path: Path, case: str, settings: str, record_property: Any
) -> None:
    theirs, mine = base(tmp_path, case)
    model = tuned(mine, tmp_path / "tuned", **SETTINGS[settings])
    export_adapter(model, tmp_path / "adapter")
    difference = float((ours(model) - by_hand(theirs, tmp_path / "adapter")).abs().max())
    moved = float((ours(model) - ours(mine)).abs().max())
    print(f"{case}, {settings}: logits differ by {difference:.1e}, the adapter moves {moved:.1e}")
    assert difference <= 1e-4 < moved

    import_adapter(tmp_path / "adapter", mine, tmp_path / "again")
    before, after = (read_model(tmp_path / name)[1] for name in ("tuned", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(ours(tmp_path / "again"), ours(model))


def test_merged_unmerged_and_exported_are_one_model(tmp_path: Path) -> None:
    theirs, mine = base(tmp_path)
    folder = tuned(mine, tmp_path / "tuned", **SETTINGS["dora"])
    model = Model.from_pretrained(folder)
    with torch.no_grad():
        apart = logits_of(model, PROBE)
        merge_adapters(model)
        merged = logits_of(model, PROBE)
        unmerge_adapters(model)
        again = logits_of(model, PROBE)
    assert cli.run(["export", str(folder), "--out", str(tmp_path / "whole")]) == 0
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        exported = peer(input_ids=PROBE).logits
    found = [float((apart - x).abs().max()) for x in (merged, again, exported)]
    print("merged {:.1e}, unmerged again {:.1e}, exported {:.1e}".format(*found))
    assert max(found) <= 1e-5


def test_peft_itself_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft (pip install peft)")
    theirs, mine = base(tmp_path)
    for name, settings in SETTINGS.items():
        model = tuned(mine, tmp_path / name, **settings)
        out = tmp_path / f"{name}-adapter"
        report = export_adapter(model, out, base=theirs)
        assert report is not None
        print(f"{name}: logits differ from peft's by {report.difference:.1e}")


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
def test_what_peft_itself_wrote_comes_in(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    import transformers

    theirs, mine = base(tmp_path, case)
    many: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    if case != "gpt2":
        many = {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        }
    for number, more in enumerate(({}, {"use_rslora": True}, {"use_dora": True})):
        peer = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, **many, **more)
        peer = peft.get_peft_model(peer, config).eval()
        with torch.no_grad():
            for name, p in peer.named_parameters():
                if "lora_" in name:
                    p.add_(0.2 * torch.randn(p.shape))
            wanted = peer(input_ids=PROBE).logits
        folder = tmp_path / f"adapter-{number}"
        peer.save_pretrained(folder)
        import_adapter(folder, mine, tmp_path / f"in-{number}")
        difference = float((ours(tmp_path / f"in-{number}") - wanted).abs().max())
        print(f"{case}, {more}: logits differ from peft's by {difference:.1e}")
        assert difference <= 1e-4
        export_adapter(tmp_path / f"in-{number}", tmp_path / f"out-{number}")
        a, b = (
            load_file(tmp_path / f"{d}-{number}" / "adapter_model.safetensors")
            for d in ("adapter", "out")
        )
        shared = a.keys() & b.keys()
        assert a.keys() <= b.keys()
        scales = [
            json.loads((tmp_path / f"{d}-{number}/adapter_config.json").read_text())
            for d in ("adapter", "out")
        ]
        assert scales[1]["use_dora"] == scales[0]["use_dora"]
        assert all(a[name].shape == b[name].shape for name in shared)


def test_dora_of_a_matrix_with_a_bias_is_as_peft_has_it() -> None:
    """Outputs and all gradients: the length scales the matrices, not the bias."""
    peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5)).double()
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(net, config).base_model.model[0]
    part = LoraConfig(base_layer=DenseConfig(bias=True), rank=2, alpha=3, dora=True).build(6, 5)
    assert isinstance(part, Lora) and part.magnitude is not None
    part.double()
    length = theirs.lora_magnitude_vector["default"].weight
    both = [
        (part.base.weight, theirs.base_layer.weight),
        (part.base.bias, theirs.base_layer.bias),
        (part.lora_a, theirs.lora_A["default"].weight),
        (part.lora_b, theirs.lora_B["default"].weight),
        (part.magnitude, length),
    ]
    with torch.no_grad():
        for own, other in both:
            other.requires_grad_()
            own.copy_(other.normal_())
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    y, wanted = part(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad((y * weight).sum(), [x, *(own for own, _ in both)])
    peers = torch.autograd.grad((wanted * weight).sum(), [x, *(other for _, other in both)])
    for found, other in zip(grads, peers, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)
    merged = part.dense_weight()
    torch.testing.assert_close(x @ merged.T + part.base.bias, y, rtol=1e-10, atol=1e-10)


def test_a_run_begins_with_an_adapter_in_pefts_format(tmp_path: Path) -> None:
    _, mine = base(tmp_path / "a")
    _, deeper = base(tmp_path / "b", num_hidden_layers=1)
    model, adapter = tuned(mine, tmp_path / "tuned", **SETTINGS["plain"]), tmp_path / "adapter"
    export_adapter(model, adapter)
    lm, _, words = read_model(mine)
    begin = lambda path: WarmStart("init_from", InitFrom(path=path, adapters=adapter), words)

    warm, module = begin(mine), with_adapters(lm, **SETTINGS["plain"]).build(words)
    module.load_state_dict(warm.fit(module, dict(warm.tensors("model"))), strict=False)
    assert torch.equal(logits_of(module.eval(), PROBE), ours(model))
    assert warm.told["adapters"] == str(adapter / "adapter_model.safetensors")

    other = with_adapters(lm, **SETTINGS["plain"] | {"alpha": 4.0}).build(words)
    with pytest.raises(UserError, match=r"needs model\.linear=\{kind: lora, rank: 3, alpha: 5"):
        warm.fit(other, dict(warm.tensors("model")))
    with pytest.raises(UserError, match=r"^init_from\.adapters: .*layers\.1\..*another base \("):
        begin(deeper)


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    _, mine = base(tmp_path / "a")
    _, deeper = base(tmp_path / "b", num_hidden_layers=1)
    _, wider = base(tmp_path / "c", hidden_size=48)
    model = tuned(mine, tmp_path / "tuned", **SETTINGS["plain"])
    adapter = tmp_path / "adapter"
    export_adapter(model, adapter)
    with pytest.raises(UserError, match=r"model\.layers\.1\..*another base"):
        import_adapter(adapter, deeper, tmp_path / "out")
    with pytest.raises(UserError, match=r"down_proj is \[40, 48\] there.*another base"):
        import_adapter(adapter, wider, tmp_path / "out")
    same = tmp_path / "same shape"
    lm, tensors, vocabulary = read_model(mine)
    tensors = {k: t * 1.5 for k, t in tensors.items()}
    files.save_model(same, lm.to_dict(), tensors, vocabulary, {"text": mine / "tokenizers/text"})
    with pytest.raises(UserError, match="weights of another base"):
        import_adapter(adapter, same, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a pattern of nothing": ({"alpha_pattern": {"nothing": 3}}, "names 'nothing'"),
    "no mapping": ({"alpha_pattern": 3}, "damaged"),
}


@pytest.mark.parametrize(
    "case", [*CONFIG, "a tensor too many", "half an adapter", "no JSON", "bits"]
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, case: str) -> None:
    _, mine = base(tmp_path)
    adapter = tmp_path / "adapter"
    export_adapter(tuned(mine, tmp_path / "tuned", **SETTINGS["plain"]), adapter)
    words, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    named = load_file(weights)
    first = next(iter(named))
    if case in CONFIG:
        changes, message = CONFIG[case]
        words.write_text(json.dumps(json.loads(words.read_text()) | changes))
    elif case == "a tensor too many":
        save_file(named | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
        message = "nothing takes its base_model.model.lm_head"
    elif case == "half an adapter":
        save_file({k: t for k, t in named.items() if k != first}, weights)
        message = "no whole adapter"
    elif case == "no JSON":
        words.write_text("{")
        message = "not valid JSON"
    else:
        weights.write_bytes(weights.read_bytes()[:40])
        message = "damaged"
    with pytest.raises(UserError, match=message):
        import_adapter(adapter, mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, mine = base(tmp_path)
    model = tuned(mine, tmp_path / "tuned", **SETTINGS["plain"])
    adapter = str(tmp_path / "adapter")
    assert cli.run(["export", str(model), "--format", "peft", "--out", adapter]) == 0
    assert cli.run(["import", adapter, "--out", str(tmp_path / "in")]) == 2
    assert "--base" in capsys.readouterr().err
    to = ["--out", str(tmp_path / "in")]
    assert cli.run(["import", adapter, "--base", str(mine), *to]) == 0
    assert torch.equal(ours(tmp_path / "in"), ours(model))
    assert cli.run(["export", str(mine), "--format", "peft", "--out", f"{adapter}2"]) == 2
    assert "has no adapters" in capsys.readouterr().err
