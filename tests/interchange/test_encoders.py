"""Encoders of pictures and sound as adapters: the hidden states of `transformers`; the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checkpoints import checkpoint
from safetensors.torch import load_file, save_file

from mm.batch import Values
from mm.cli import main as cli
from mm.config import validate
from mm.errors import UserError
from mm.interchange.check import TOLERANCE
from mm.interchange.family import Settings
from mm.interchange.read import read_settings
from mm.interchange.read_encoder import hidden_states, import_encoder
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.model.folder import load_tensors, read_config
from mm.model.model import LmConfig
from mm.registry import ENCODERS, SURGERIES
from mm.surgery.base import Operated
from mm.tokenizers.load import load_tokenizers
from mm.vocabulary import Vocabulary

VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 14,  # the last two rows and columns fill no patch
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
WHISPER = {
    "vocab_size": 60,
    "num_mel_bins": 6,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "d_model": 24,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_source_positions": 50,  # of 20 ms
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# Name -> (family, config class, class, settings).
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViTConfig", "ViTModel", VISION),
    "vit, a classifier": ("vit", "ViTConfig", "ViTForImageClassification", VISION),
    "clip": ("clip_vision_model", "CLIPVisionConfig", "CLIPVisionModel", VISION),
    "clip, whole": (
        "clip",
        "CLIPConfig",
        "CLIPModel",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION},
    ),
    "siglip": ("siglip_vision_model", "SiglipVisionConfig", "SiglipVisionModel", VISION),
    "siglip, whole": (
        "siglip",
        "SiglipConfig",
        "SiglipModel",
        {"text_config": TEXT, "vision_config": VISION},
    ),
    "whisper": ("whisper", "WhisperConfig", "WhisperModel", WHISPER),
    "whisper, whole": ("whisper", "WhisperConfig", "WhisperForConditionalGeneration", WHISPER),
}


SIDE = {"height": 14, "width": 14}
CUT = {"size": {"shortest_edge": 16}, "crop_size": SIDE}
# Name -> (class, settings) of what makes pictures and sounds for them.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {"size": SIDE}),
    "clip": ("CLIPImageProcessor", CUT),
    "clip, whole": ("CLIPImageProcessor", {"size": SIDE, "do_center_crop": False}),
    "siglip": ("SiglipImageProcessor", {"size": SIDE, "image_std": [0.3, 0.4, 0.6]}),
    "whisper": ("WhisperFeatureExtractor", {"feature_size": 6, "chunk_length": 1}),
}


def processor(folder: Path, case: str) -> Path:
    """Write what makes the values of an encoder, of `transformers`, beside it."""
    transformers = pytest.importorskip("transformers")
    name, settings = PROCESSORS[case]
    getattr(transformers, name)(**settings).save_pretrained(folder)
    return folder


def encoder(folder: Path, case: str = "vit") -> Path:
    """Write a small random encoder of `transformers`."""
    transformers = pytest.importorskip("transformers")
    _, config, name, settings = CASES[case]
    torch.manual_seed(5)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).float()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn_like(p)
            p.add_(0.2 * noise) if p.dim() < 2 else p.copy_(noise * p[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def test_every_encoder_has_a_case() -> None:
    assert {family for family, *_ in CASES.values()} == {*ENCODERS}


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    given = encoder(tmp_path / "given", case)
    report = import_encoder(given, tmp_path / "ours", read_settings(given))
    assert report.difference <= TOLERANCE and report.spread > 0.1


@pytest.mark.parametrize("case", PROCESSORS)
def test_pictures_and_sounds_are_made_as_by_the_folders_own_processor(
    case: str, tmp_path: Path
) -> None:
    given = processor(encoder(tmp_path / "given", case), case)
    report = import_encoder(given, tmp_path / "ours", read_settings(given))
    assert report.difference <= TOLERANCE
    c = read_settings(given)
    family: Any = ENCODERS.parse(c["model_type"])
    c = c if family.inside is None else Settings(c[family.inside], "")
    values, wanted = family.probe(c, given)
    config = validate(EncoderAdapterConfig, read_config(tmp_path / "ours"), "ours")
    if family.modality == "audio":
        found = values.data.unflatten(2, (2, 6)).flatten(1, 2).transpose(1, 2)
    else:
        found = values.data.float() / 255
        if config.inner.mean is not None:
            found = found.unflatten(2, (16, 3))
            found = (found - torch.tensor(config.inner.mean)) / torch.tensor(config.inner.std)
        else:
            found = 2 * found.unflatten(2, (16, 3)) - 1
        found = found.unflatten(2, (4, 4)).unflatten(1, (3, 3)).permute(0, 5, 1, 3, 2, 4)
        found, wanted = found.reshape(2, 3, 12, 12), wanted[..., :12, :12]
    assert found.std() > 0.1 and (found - wanted).abs().max() <= 1e-4
    (tokenizer,) = load_tokenizers(tmp_path / "ours" / "tokenizers").values()
    assert tokenizer.spec.n_features == config.d_in


@pytest.mark.parametrize("case", ["vit", "siglip"])
def test_a_short_item_is_read_as_it_would_be_alone(case: str, tmp_path: Path) -> None:
    given = encoder(tmp_path / "given", case)
    import_encoder(given, tmp_path / "ours", read_settings(given), check=False)
    config = validate(EncoderAdapterConfig, read_config(tmp_path / "ours"), "ours")
    tensors = load_tensors(tmp_path / "ours" / "model.safetensors")
    data = torch.randn(2, 9, config.d_in)
    both = hidden_states(config, tensors, Values.items(data, torch.tensor([9, 4])))
    alone = hidden_states(config, tensors, Values.items(data[1:, :4]))
    torch.testing.assert_close(both[1:, :4], alone)
    other = data.clone()
    other[0] = 0
    again = hidden_states(config, tensors, Values.items(other, torch.tensor([9, 4])))
    torch.testing.assert_close(both[1, :4], again[1, :4])
    assert not torch.allclose(both[0], again[0])


def test_it_becomes_an_adapter_of_an_imported_model(tmp_path: Path) -> None:
    given, text = encoder(tmp_path / "given"), checkpoint(tmp_path / "text")
    ours, enc = tmp_path / "ours", tmp_path / "enc"
    assert cli.run(["import", str(text), "--out", str(ours), "--no-check"]) == 0
    assert cli.run(["import", str(given), "--out", str(enc)]) == 0
    lm = validate(LmConfig, read_config(ours), "ours")
    words = Vocabulary.load(ours / "vocabulary.json")
    before = Operated(lm, load_tensors(ours / "model.safetensors"), words)
    surgery: Any = SURGERIES.get("graft_adapter")(modality="image", path=enc)
    after = surgery.apply(before, None)
    model = after.config.build(words)
    model.load_state_dict(after.tensors)
    config = after.config.adapters["image"]
    values = Values.items(torch.rand(1, 9, config.d_in))
    adapter = model.adapters["image"]
    states = hidden_states(config, load_tensors(enc / "model.safetensors"), values)
    torch.testing.assert_close(adapter.eval()(values, None).x, adapter.out(states))
    again = surgery.apply(before, None)
    assert all(torch.equal(t, again.tensors[n]) for n, t in after.tensors.items())
    with pytest.raises(UserError, match="a saved 'lm' is no adapter"):
        SURGERIES.get("graft_adapter")(modality="image", path=ours).apply(before, None)


def test_refusals(tmp_path: Path) -> None:
    given = encoder(tmp_path / "given")
    out = tmp_path / "out"
    pixels = given / "preprocessor_config.json"
    for values, match in (
        ({"image_mean": [0.4, 0.5]}, "image_mean = .* is not three numbers"),
        ({"size": {"height": 20, "width": 20}}, "size = .* is not image_size 14 of the model"),
        ({"resample": 0}, "resample = '0' has no equal"),
        ({"do_pad": True}, "do_pad = 'True' has no equal"),
        ({"size": {"shortest_edge": 14}}, "makes pictures of many shapes"),
    ):
        pixels.write_text(json.dumps(values))
        with pytest.raises(UserError, match=match):
            import_encoder(given, out, read_settings(given))
    pixels.write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json: not valid JSON"):
        import_encoder(given, out, read_settings(given))
    pixels.unlink()
    tensors = load_file(given / "model.safetensors")
    bias = tensors.pop("layernorm.bias")
    save_file(tensors, given / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks layernorm.bias"):
        import_encoder(given, out, read_settings(given))
    save_file(
        {**tensors, "layernorm.bias": bias + 0.0}, given / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps({**config, "hidden_act": "relu6"}))
    with pytest.raises(UserError, match="hidden_act = 'relu6'"):
        import_encoder(given, out, read_settings(given))
    (given / "config.json").write_text(json.dumps({**config, "qkv_bias": False}))
    with pytest.raises(UserError, match="qkv_bias"):
        import_encoder(given, out, read_settings(given))
    assert [p.name for p in tmp_path.iterdir()] == ["given"]
