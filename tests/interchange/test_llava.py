"""A vision-language model whole: in, asked with a picture, tuned, out again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_checkpoints import SHAPE
from safetensors.torch import load_file, save_file
from test_encoders import VISION
from torch import Tensor

from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.interchange.check import STEPS, TOLERANCE
from mm.interchange.read import import_model
from mm.interchange.write import export_model
from mm.model.folder import load_tensors
from mm.model.model import Model
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.hf import HfConfig, HfTokenizer

IMAGE = 300  # id of the picture's places
TOWERS = {
    "clip": (
        "CLIPVisionConfig",
        {**VISION, "num_hidden_layers": 3},
        "default",
        "CLIPImageProcessor",
    ),
    "siglip": (
        "SiglipVisionConfig",
        {**VISION, "num_hidden_layers": 3},
        "full",
        "SiglipImageProcessor",
    ),
}
TEXTS = {"clip": ("LlamaConfig", {}), "siglip": ("Qwen2Config", {"bos_token_id": None})}
SIDE = {"height": 14, "width": 14}


def llava(folder: Path, tower: str = "clip", **more: Any) -> Path:
    """Write a small random LLaVA of `transformers`, with its processor and a tokenizer."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    kind, vision, strategy, processor = TOWERS[tower]
    text, settings = TEXTS[tower]
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, kind)(**vision),
        text_config=getattr(transformers, text)(**{**SHAPE, **settings}),
        image_token_id=IMAGE,
        vision_feature_select_strategy=strategy,
        **more,
    )
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.add_(0.2 * noise) if p.dim() < 2 else p.copy_(noise * p[0].numel() ** -0.5)
    model.save_pretrained(folder, max_shard_size="40KB")
    cut = {"size": {"shortest_edge": 16}, "crop_size": SIDE} if tower == "clip" else {"size": SIDE}
    getattr(transformers, processor)(**cut).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(HfConfig.smallest_tokenizer().source)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tower", TOWERS)
def test_in_and_out(tower: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given, ours, back = llava(tmp_path / "given", tower), tmp_path / "ours", tmp_path / "back"
    with caplog.at_level(logging.WARNING):
        report = import_model(given, ours)
    assert report is not None and report.difference <= TOLERANCE and report.continued == 2 * STEPS
    assert report.spread > 0.1 and report.logits == 2 * (48 + 9) * SHAPE["vocab_size"]
    assert "vision_tower.encoder.layers.2.layer_norm1.bias" in caplog.text, "which nothing reads"
    again = export_model(ours, back)
    assert again is not None and again.difference <= TOLERANCE
    print(f"{tower}: logits differ by {report.difference:.1e} in, {again.difference:.1e} out")
    before, after = tensors_of(given), tensors_of(back)
    unread = {
        n for n in before if n.startswith(("vision_tower.encoder.layers.2.", "vision_tower.head"))
    }
    assert before.keys() - unread == after.keys()
    norm = {n for n in after if "post_layernorm" in n}
    assert all(torch.equal(before[n], after[n]) for n in after.keys() - norm)
    config = json.loads((back / "config.json").read_text())
    assert config["image_token_index"] == IMAGE and config["vision_feature_layer"] == -1
    assert (
        config["vision_config"]["image_size"] == 14 and config["text_config"]["vocab_size"] == 320
    )
    read = json.loads((back / "preprocessor_config.json").read_text())
    first = json.loads((given / "preprocessor_config.json").read_text())
    assert read["image_mean"] == first["image_mean"] and read["resample"] == first["resample"]
    import_model(back, tmp_path / "third", check=False)
    one, two = (load_tensors(f / "model.safetensors") for f in (ours, tmp_path / "third"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_a_picture_in_a_prompt_is_answered_as_by_transformers(tmp_path: Path) -> None:
    """The picture stands inside the text: no begin and no end of it, nor of the text around it."""
    import transformers

    given = llava(tmp_path / "given")
    import_model(given, tmp_path / "ours", check=False)
    rng = np.random.default_rng(2)
    pictures = [
        rng.integers(0, 256, shape).astype(np.uint8) for shape in ((30, 20, 3), (14, 40, 3))
    ]
    peer = transformers.LlavaForConditionalGeneration.from_pretrained(given).eval()
    processor: Any = transformers.AutoImageProcessor.from_pretrained(given)
    generator = Generator.from_pretrained(tmp_path / "ours")
    words = generator.encode("text", ["the cat sat on"])[0].tolist()
    settings = {"temperature": 0, "max_tokens": 6}
    said = generator.generate(
        [{"image": p, "text": "the cat sat on"} for p in pictures], "text", **settings
    )
    for picture, text in zip(pictures, said, strict=True):
        ids = torch.tensor([[SHAPE["bos_token_id"], *[IMAGE] * 9, *words]])
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        out = peer.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
            max_new_tokens=6, do_sample=False, eos_token_id=SHAPE["eos_token_id"], pad_token_id=0,
        )[0, 10:]  # fmt: skip
        ids = [i for i in out.tolist() if i != SHAPE["eos_token_id"]]
        assert text == generator.decode("text", [np.array(ids, np.int32)])[0]


def test_older_names_of_tensors(tmp_path: Path) -> None:
    given = llava(tmp_path / "given")
    import_model(given, tmp_path / "ours", check=False)
    older = lambda n: n.replace("vision_tower.", "vision_tower.vision_model.")
    newer = lambda n: n.replace("language_model.lm_head", "lm_head").replace(
        "language_model.model.", "model.language_model."
    )
    for rename in (older, newer):
        tensors = {rename(n): t for n, t in tensors_of(given).items()}
        assert tensors.keys() != tensors_of(given).keys()
        for file in [*given.glob("*.safetensors"), *given.glob("*.index.json")]:
            file.unlink()
        save_file(tensors, given / "model.safetensors", {"format": "pt"})
        import_model(given, tmp_path / rename("again"), check=False)
        one, two = (load_tensors(tmp_path / d / "model.safetensors") for d in ("ours", "again"))
        assert all(torch.equal(one[n], two[n]) for n in one)
        (tmp_path / "again").rename(tmp_path / f"done{len(list(tmp_path.iterdir()))}")


FAULTS = {
    "vision_feature_select_strategy": ("full", "vision_feature_select_strategy = 'full'"),
    "vision_feature_layer": ([-2, -1], "vision_feature_layer = .* is not one of the 3 layers"),
    "projector_hidden_act": ("relu", "projector_hidden_act = 'relu'"),
    "multimodal_projector_bias": (False, "multimodal_projector_bias = 'False'"),
    "vision_config": (
        {"model_type": "pixtral"},
        "vision_config: model_type = 'pixtral' is none of",
    ),
    "text_config": ({"model_type": "gpt2"}, "text_config: model_type = 'gpt2' is no decoder"),
}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    given = llava(tmp_path / "given")
    values = json.loads((given / "config.json").read_text())
    for key, (value, match) in FAULTS.items():
        (given / "config.json").write_text(json.dumps({**values, key: value}))
        with pytest.raises(UserError, match=match):
            import_model(given, tmp_path / "ours", check=False)
        assert not (tmp_path / "ours").exists()


def test_a_model_without_places_for_pictures_does_not_go_out(tmp_path: Path) -> None:
    import_model(llava(tmp_path / "given"), tmp_path / "ours", check=False)
    places = {p.name: p for p in (tmp_path / "ours" / "tokenizers").iterdir()}
    text: Any = load_tokenizer(places["text"])
    HfTokenizer(text.config, text.source).save(tmp_path / "text")
    places["text"] = tmp_path / "text"
    model = Model.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain", tokenizers=places)
    with pytest.raises(UserError, match="no image_token_index can be written"):
        export_model(tmp_path / "plain", tmp_path / "back")
