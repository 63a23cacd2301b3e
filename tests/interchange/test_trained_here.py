"""A model that `mm train` made, with our BPE, in the tools of others; what cannot go there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mm.cli import main as cli
from mm.errors import UserError
from mm.interchange.ids import BEGIN, END
from mm.interchange.read import import_model
from mm.interchange.write import export_model
from mm.model.folder import load_tensors
from mm.model.layer import init_weights
from mm.model.model import LmConfig, Model
from mm.specs import TokenSpec
from mm.tokenizers.text.bpe import BpeConfig
from mm.vocabulary import Vocabulary

LINES = [f"the cat sat on mat {i}, naïve 漢字 and <|end_of_text|> in a text" for i in range(8)]
DATA = {"kind": "packed", "seq_len": 96, "batch_size": 2, "sources": [{"path": "tokens"}]}
STAGE = {
    "data": DATA,
    "objective": "next_token",
    "budget": {"steps": 4},
    "schedule": {"shape": "constant", "warmup": 1},
}
MODEL: dict[str, Any] = {"kind": "lm", "d_model": 40}


def test_a_run_with_our_bpe_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for i, line in enumerate(LINES):
        Path(f"texts/{i}.txt").write_text(line * 3)
    bpe = BpeConfig(vocab_size=300).fit(LINES)
    bpe.save("bpe/text")
    assert cli.run(["data", "pack", "texts", "--out", "tokens", "--tokenizers", "bpe"]) == 0
    model = {**MODEL, "backbone": {"kind": "stack", "pattern": "2*attention"}}
    model["backbone"]["mixers"] = {"attention": {"heads": 4, "kv_heads": 2}}
    words = {"vocabulary": "tokens/vocabulary.json", "tokenizers": {"text": "bpe/text"}}
    run = {"name": "mine", "out": "runs", **words, "model": model}
    Path("run.yaml").write_text(yaml.safe_dump({**run, "stages": [STAGE]}))
    assert cli.run(["train", "run.yaml"]) == 0
    # The command itself compares logits with those of the run; embeddings took their factor in.
    assert cli.run(["export", "runs/mine", "--out", "out"]) == 0

    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        "out", output_loading_info=True
    )
    assert not any(found.values()), found
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    size = bpe.spec.vocab_size
    assert theirs.config.model_type == "qwen3" and theirs.config.vocab_size == size + 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size, size + 1)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BEGIN, END)
    for line in LINES[:2]:
        (code,) = bpe.encode([line])
        assert tokenizer(line, add_special_tokens=False).input_ids == code.ids.tolist()
        assert tokenizer(line).input_ids == [size, *code.ids.tolist()]
        assert tokenizer.decode(code.ids.tolist()) == line
    # And back: the same tensors, with ids for begin and end of their own.
    import_model("out", "again")
    export_model("again", "back")
    one, two = (load_tensors(Path(d) / "model.safetensors") for d in ("out", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def saved(folder: Path, vocabulary: Vocabulary | None = None, **settings: Any) -> Path:
    """A model of ours with random weights and a BPE."""
    bpe = BpeConfig.smallest_tokenizer()
    bpe.save(folder.parent / "bpe")
    vocabulary = vocabulary or Vocabulary().add(bpe.spec)
    torch.manual_seed(4)
    model = LmConfig.model_validate({**MODEL, **settings}).build(vocabulary)
    assert isinstance(model, Model)
    init_weights(model)
    model.save_pretrained(folder, tokenizers={"text": folder.parent / "bpe"})
    return folder


@pytest.mark.parametrize(
    ("word", "family"),
    [
        ("mamba", "mamba"),
        ("mamba2", "mamba2"),
        ("rg_lru local_attention", "recurrent_gemma"),
        ("gated_deltanet gated_attention", "qwen3_next"),
    ],
)
def test_a_family_has_the_mixers_that_presets_name(word: str, family: str, tmp_path: Path) -> None:
    bare = {"ffn": None} if family.startswith("mamba") else {}
    scale = {"kind": "sum", "scale": 1.0}
    given = saved(
        tmp_path / "m", backbone={"kind": "stack", "pattern": word, **bare}, embedder=scale
    )
    if family.startswith("mamba"):
        pytest.importorskip("transformers")
        report = export_model(given, tmp_path / "out")
        assert report is not None and report.spread > 0.1
        assert f'"model_type": "{family}"' in (tmp_path / "out" / "config.json").read_text()
        return
    why = "nearest is 'recurrent_gemma', but model"
    why = why if family == "recurrent_gemma" else "'qwen3_next': model.backbone.ffn is no 'moe'"
    with pytest.raises(UserError, match=why) as caught:
        export_model(given, tmp_path / "out", check=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mixers": (
        {"backbone": {"kind": "stack", "pattern": "hyena rwkv6 attention"}},
        ["mixers.hyena ('hyena')", "mixers.rwkv6 ('rwkv6')"],
    ),
    "settings": (
        {
            "backbone": {
                "kind": "stack",
                "pattern": "2*attention",
                "mixers": {"attention": {"sinks": True}},
            }
        },
        [".sinks is True, there False"],
    ),
    "two settings": (
        {
            "backbone": {
                "kind": "stack",
                "pattern": "2*attention",
                "mixers": {"attention": {"sinks": True, "log_n": 8.0}},
            },
            "mask": "prefix",
        },
        [".sinks is True", ".log_n is 8.0", "mask is 'prefix'"],
    ),
    "a factor of tied rows": (
        {"heads": {"tokens": {"kind": "softmax", "tied": True}}},
        ["model.embedder.scale is 6.3"],
    ),
    "embedder": (
        {"embedder": {"kind": "factorized", "rank": 8, "scale": 1.0}},
        ["model.embedder.kind is 'factorized', there 'sum'", "rank is 8"],
    ),
    "heads": (
        {"heads": {"tokens": "softmax", "more": "softmax"}},
        ["model.heads.more ('softmax')"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_has_no_equal_is_named_key_by_key(fault: str, tmp_path: Path) -> None:
    settings, named = FAULTS[fault]
    given = saved(tmp_path / "m", **settings)
    with pytest.raises(UserError) as caught:
        export_model(given, tmp_path / "out", check=False)
    assert all(name in str(caught.value) for name in named), caught.value
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_modalities_are_named(tmp_path: Path) -> None:
    vocabulary = Vocabulary().add(BpeConfig.smallest_tokenizer().spec)
    vocabulary = vocabulary.add(TokenSpec("image", 7)).add(TokenSpec("audio", 5))
    given = saved(tmp_path / "m", vocabulary)
    with pytest.raises(UserError, match="layout: vocabulary.image; vocabulary.audio$"):
        export_model(given, tmp_path / "out", check=False)
