"""Laws of every registered surgery: whole, pure, and the same function where it says so."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, V

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model import folder
from mm.model.layer import init_weights
from mm.model.slices import Lazy
from mm.registry import ADAPTERS, NETWORKS, SURGERIES
from mm.specs import TokenSpec
from mm.surgery.base import Operated, network_of, on_meta, own_tensors
from mm.vocabulary import Vocabulary

LONGER = VOCABULARY.add(TokenSpec("more", 9, fingerprint="more"))
FULL = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "gate": True, "sinks": True}
ALONE = {"kind": "attention", "heads": 4, "head_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"backbone": {"mixers": {"own": FULL}, "pattern": "own", "depth": 2}},
    "heads": {"backbone": {"mixers": {"own": ALONE}, "pattern": "own", "depth": 2}},
    "three": {
        "backbone": {
            "mixers": {"own": ALONE},
            "pattern": "own",
            "depth": 3,
            "ffns": {"own": {"kind": "mlp"}},
        }
    },
    "hybrid": {"backbone": {"pattern": "rg_lru local_attention", "depth": 4}},
    "mamba_moe": {"backbone": {"pattern": "mamba delta_rule", "ffn": "moe"}},
    "parallel": {"backbone": {"block": "parallel", "ffn": "mlp"}},
    "post": {"backbone": {"block": {"kind": "prenorm", "post_norms": True}}},
    "lora": {"linear": {"kind": "lora", "rank": 2}},
    "qdora": {
        "linear": {"kind": "lora", "base_layer": "nf4", "dora": True, "targets": ["qkv", "out"]}
    },
    "ternary": {"linear": "ternary"},
    "nested": {"backbone": {"ffn": {"kind": "nested", "hidden": 64, "gated": True}}},
    "tied": {"heads": {"tokens": {"kind": "softmax", "tied": True}}},
}
LAYERS = {f"backbone.layers.{i}.mixer": (1, 2) for i in range(2)}
DENSE = ("attention", "heads", "hybrid", "mamba_moe", "parallel", "post", "tied")
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # settings, models it works on
    "deepen": ({"times": 3}, (*DENSE, "lora", "qdora", "ternary")),
    "extend_vocabulary": ({}, ("attention", "tied", "lora")),
    "graft_adapter": ({"modality": "image", "path": "encoder"}, ("attention", "tied")),
    "keep_layers": ({"layers": [1]}, ("attention", "hybrid", "mamba_moe")),
    "linearize": ({}, ("attention", "heads", "hybrid")),
    "merge_lora": ({}, ("lora", "qdora")),
    "pool_heads": ({"kv_heads": 1}, ("attention", "heads", "parallel")),
    "prune_heads": ({"heads": LAYERS}, ("heads",)),
    "slice_nested": ({"hidden": [16, 40]}, ("nested",)),
    "widen": ({"hidden": 160, "heads": 8}, ("attention", "heads", "hybrid", "parallel", "tied")),
}
CASES = [(kind, m) for kind, (_, models) in RECIPES.items() for m in models]


def model(name: str) -> Operated:
    """A small model whose every parameter was moved, adapters included."""
    values = {"kind": "lm", "d_model": 32, **MODELS[name]}
    stack = {"kind": "stack", "depth": 2, "pattern": "attention", **values.get("backbone", {})}
    config = NETWORKS.parse(values | {"backbone": stack})
    torch.manual_seed(4)
    made = config.build(VOCABULARY)
    init_weights(made)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Operated(config, own_tensors(made), VOCABULARY)


def on_disk(it: Operated) -> tuple[Operated, list[weakref.ref[torch.Tensor]]]:
    """The model with tensors that are made when they are asked for, and all that were."""
    reads: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        tensor = it.tensors[name].clone()
        reads.append(weakref.ref(tensor))
        return tensor

    lazy = Lazy({n: tuple(t.shape) for n, t in it.tensors.items()}, read, on_meta(it.tensors))
    return it._replace(tensors=lazy), reads


def outputs(it: Operated) -> torch.Tensor:
    layout = Layout.from_rows([[Doc(9), Doc(4)], [Doc(13)]])
    ids = torch.randint(V, layout.shape, generator=torch.Generator().manual_seed(0))
    net = network_of(it).double()
    with torch.no_grad():
        head = net(Batch.of_ids(ids, layout), loss=False).heads["tokens"]
    return head.dist.logits


def test_every_surgery_has_a_recipe() -> None:
    assert sorted(RECIPES) == sorted(SURGERIES)


@pytest.mark.parametrize("kind, name", CASES)
def test_a_surgery_is_whole_and_pure_and_keeps_what_it_promises(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "graft_adapter":
        config = ADAPTERS.get("encoder").smallest()
        weights = own_tensors(config.build(32))
        folder.save_model("encoder", config.to_dict(), weights, VOCABULARY, {})
    before, reads = on_disk(model(name))
    copies = dict(before.tensors)
    reads.clear()
    surgery: Any = SURGERIES.parse({"kind": kind, **RECIPES[kind][0]})
    after = surgery.apply(before, LONGER if kind == "extend_vocabulary" else VOCABULARY)
    assert not reads, "nothing is read before it is asked for"
    for k in after.tensors:
        assert after.tensors[k] is not None
        assert all(read() is None for read in reads), f"something is kept beside {k}"
    assert all(torch.equal(copies[k], t) for k, t in before.tensors.items())
    built = after.config.build(after.vocabulary)
    wanted = {k: t.shape for k, t in built.state_dict().items()}
    assert {k: t.shape for k, t in after.tensors.items()} == wanted
    again = NETWORKS.parse(after.config.to_dict())
    assert again == after.config, "a YAML can say what it made"
    found, was = outputs(after), outputs(before)
    assert torch.isfinite(found).all()
    if kind == "extend_vocabulary":
        assert after.vocabulary == LONGER
        torch.testing.assert_close(found[:, : was.shape[1]], was, rtol=1e-9, atol=1e-9)
    elif surgery.keeps_function:
        rounding = 1e-5 if kind == "merge_lora" else 1e-9
        torch.testing.assert_close(found, was, rtol=rounding, atol=rounding)
        size = lambda it: sum(t.numel() for t in it.tensors.values())
        assert kind == "merge_lora" or size(after) > size(before)
    else:
        assert not torch.allclose(found, was, atol=1e-4)


def test_what_is_new_learns() -> None:
    """Copies and new units are nothing at first; the first gradients reach their last matrices."""
    for kind in ("deepen", "widen"):
        surgery = SURGERIES.parse({"kind": kind, **RECIPES[kind][0]})
        net = network_of(surgery.apply(model("attention"), VOCABULARY)).train()
        layout = Layout.from_rows([[Doc(9)]])
        head = net(Batch.of_ids(torch.arange(9)[None] % V, layout)).heads["tokens"]
        head.nll.sum().backward()
        last = net.get_parameter(f"backbone.layers.{1 if kind == 'deepen' else 0}.ffn.out.weight")
        assert float(last.grad[:, -8:].abs().max()) > 0, kind


def test_the_layers_kept_are_those_named() -> None:
    before = model("hybrid")
    after = SURGERIES.parse({"kind": "keep_layers", "layers": [0, 3]}).apply(before, VOCABULARY)
    assert after.config.backbone.words() == ["rg_lru", "local_attention"]
    old, new = before.tensors, after.tensors
    name = "mixer.qkv.weight"
    assert torch.equal(new[f"backbone.layers.1.{name}"], old[f"backbone.layers.3.{name}"])


def test_a_linear_attention_takes_the_attentions_projections() -> None:
    before = model("attention")
    after = SURGERIES.parse("linearize").apply(before, VOCABULARY)
    q, k, v = after.tensors["backbone.layers.0.mixer.qkv.weight"].unflatten(0, (3, 4, 4))
    old = before.tensors["backbone.layers.0.mixer.qkv.weight"].unflatten(0, (8, 4))
    assert (
        torch.equal(q, old[:4]) and torch.equal(k[::2], k[1::2]) and torch.equal(k[::2], old[4:6])
    )
    assert torch.equal(v[1::2], old[6:])


def test_some_layers_alone_are_linearized() -> None:
    before = model("three")
    after = SURGERIES.parse({"kind": "linearize", "layers": [0, 2]}).apply(before, VOCABULARY)
    stack = after.config.backbone
    assert stack.words() == ["linear_own", "own", "linear_own"]
    assert stack.mixer("linear_own").kind == "linear_attention"
    assert stack.ffns["linear_own"] == stack.ffns["own"] and stack.ffns["own"].kind == "mlp"
    layer = lambda it, i: {
        n: t for n, t in it.tensors.items() if n.startswith(f"backbone.layers.{i}.mixer.")
    }
    assert [layer(before, i).keys() == layer(after, i).keys() for i in range(3)] == [0, 1, 0]
    assert all(torch.equal(t, layer(after, 1)[n]) for n, t in layer(before, 1).items())
    assert torch.isfinite(outputs(after)).all()


@pytest.mark.parametrize(
    "kind, settings, name, why",
    [
        ("keep_layers", {"layers": [2]}, "attention", "layers 0 to 1"),
        ("keep_layers", {"layers": [1, 0]}, "attention", "no rising numbers"),
        ("linearize", {}, "mamba_moe", "no `attention` layer"),
        ("linearize", {"layers": [0, 5]}, "heads", r"\[0, 5\] only \[0, 1\] are `attention`"),
        ("pool_heads", {"kv_heads": 3}, "heads", "do not make 3 groups"),
        ("merge_lora", {}, "heads", "neither adapters nor nf4"),
        ("slice_nested", {}, "heads", "no `nested` feed-forward"),
        ("slice_nested", {"hidden": [8, 8, 8]}, "nested", "3 widths for 2 nested layers"),
        ("slice_nested", {"hidden": 65}, "nested", r"layers\.0\.ffn has 64 hidden units, not 65"),
        ("widen", {"hidden": 8}, "heads", "cannot shrink"),
        ("widen", {"hidden": 99}, "mamba_moe", "hidden is of mlp and swiglu"),
        ("widen", {"heads": 5}, "attention", "no multiple of 2"),
        ("prune_heads", {"heads": {"backbone.layers.7.mixer": [0]}}, "heads", "did you mean"),
        ("prune_heads", {"heads": {"backbone.layers.0.mixer": [7]}}, "heads", "heads 0 to 3"),
        ("extend_vocabulary", {}, "heads", "does not begin with the old"),
    ],
)
def test_what_cannot_be_operated_on_is_refused(
    kind: str, settings: dict[str, Any], name: str, why: str
) -> None:
    wanted = Vocabulary() if kind == "extend_vocabulary" else VOCABULARY
    with pytest.raises(UserError, match=why):
        SURGERIES.parse({"kind": kind, **settings}).apply(model(name), wanted)
