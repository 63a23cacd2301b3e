"""LLaVA: a picture encoder's patches, through two matrices, inside the text of a decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mm.config import validate
from mm.errors import UserError
from mm.interchange.check import Media
from mm.interchange.encoders.family import Vision, both
from mm.interchange.families.decoder import Decoder
from mm.interchange.family import Family, Settings, own_places
from mm.interchange.parts import Entry
from mm.interchange.probes import peer_pixels, picture_values, random_pictures
from mm.interchange.processor import FILE, WHOLE, read_pixels, write_pixels
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.model.model import LmConfig
from mm.registry import ENCODERS, FAMILIES
from mm.specs import ModalityTokenizer
from mm.tokenizers.image.processed import ProcessedPatches, ProcessedPatchesConfig

IMAGE, TEXT, TOWER = "image", "language_model.", "vision_tower."
PROJECTOR = "multi_modal_projector"
TOWERS = ("clip_vision_model", "siglip_vision_model")
TOKEN = "image_token_index"
# As newer tools name tensors, and as their files, and all older ones, do.
NAMES = (
    (re.compile(r"^model\.language_model\."), f"{TEXT}model."),
    (re.compile(r"^lm_head\."), f"{TEXT}lm_head."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector)\."), r"\1."),
    (re.compile(r"^vision_tower\.vision_model\."), TOWER),
)
# What a text config means that does not say it: Llama's own.
USUAL = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
}


@FAMILIES.register("llava")
class Llava(Family):
    """Liu et al. 2023 (arXiv:2304.08485) and LLaVA-1.5 (arXiv:2310.03744).

    The decoder is any family's whose tensors are named as Llama's. Layers of the tower behind
    ``vision_feature_layer`` are read by nobody: they are left out, and on the way back the tower
    ends with the layer that is read.
    """

    kind: Literal["llava"] = "llava"
    architecture: ClassVar[str] = "LlavaForConditionalGeneration"
    auto: ClassVar[str] = "AutoModelForImageTextToText"
    table: ClassVar[tuple[str, str, str]] = (
        f"{TEXT}model.embed_tokens.weight",
        f"{TEXT}lm_head.weight",
        f"{TEXT}model",
    )
    silent: ClassVar[str] = r"\.rotary_emb\.inv_freq$|\.position_ids$"
    origin: ClassVar[tuple[str, ...]] = (TOKEN,)

    # ---- in ----

    def rename(self, name: str) -> str:
        for pattern, ours in NAMES:
            name = pattern.sub(ours, name)
        return name

    def text(self, c: Settings) -> Settings:
        text = c.inside("text_config", USUAL)
        if "tie_word_embeddings" in c:
            text = text.with_usual({"tie_word_embeddings": c["tie_word_embeddings"]})
        return text

    def model(self, c: Settings) -> dict[str, Any]:
        text = self.text(c)
        inner = FAMILIES.get(text["model_type"]) if text["model_type"] in FAMILIES else None
        if inner is None or not issubclass(inner, Decoder) or inner.table != Decoder.table:
            raise text.refuse("model_type", "is no decoder whose tensors are named as Llama's")
        family = FAMILIES.parse(text["model_type"])
        assert isinstance(family, Decoder)
        return {**family.model(text), "adapters": {IMAGE: self._tower(c)}}

    def _tower(self, c: Settings) -> dict[str, Any]:
        given = c.inside("vision_config", {})
        tower = tower_of(given)
        c.only("projector_hidden_act", "gelu")
        c.only("multimodal_projector_bias", True)
        wanted = "default" if tower.before else "full"
        c.only("vision_feature_select_strategy", wanted, default="default")
        made = tower.adapter(given)
        depth, layer = len(made["backbone"]["pattern"].split()), c.get("vision_feature_layer", -2)
        read = layer if type(layer) is not int or layer >= 0 else depth + 1 + layer
        if type(read) is not int or not 1 <= read <= depth:
            raise c.refuse("vision_feature_layer", f"is not one of the {depth} layers of the tower")
        made["backbone"] |= {"pattern": " ".join(["attention"] * read), "norm": "none"}
        return {**made, "out_layers": 2}

    def readers(
        self, c: Settings, folder: Path, lm: LmConfig
    ) -> tuple[LmConfig, dict[str, ModalityTokenizer]]:
        given = c.inside("vision_config", {})
        tower = tower_of(given)
        given = given.with_usual(tower.usual)
        pixels = read_pixels(folder, tower.processor, given.whole("image_size"))
        patches = pixels.tokenizer(given.whole("patch_size"), inline=True)
        adapter: Any = lm.adapters[IMAGE]
        inner = validate(type(adapter.inner), adapter.inner.to_dict() | pixels.channels, c.origin)
        adapter = adapter.model_copy(update={"inner": inner})
        lm = lm.model_copy(update={"adapters": {IMAGE: adapter}})
        return lm, {IMAGE: ProcessedPatchesConfig(**patches).build()}

    def is_unread(self, lm: LmConfig, name: str) -> bool:
        adapter: Any = lm.adapters[IMAGE]
        layer = re.match(rf"{TOWER}encoder\.layers\.(\d+)\.", name)
        if layer:
            return int(layer[1]) >= len(adapter.backbone.words())
        return name.startswith((f"{TOWER}head.", f"{TOWER}post_layernorm."))

    # ---- out ----

    def config(self, lm: LmConfig) -> dict[str, Any]:
        adapter = require_tower(lm)
        tower, text = tower_like(adapter), self._text_family(lm)
        inner = text.config(without_tower(lm))
        vision = tower.config(adapter)
        return {
            "text_config": {**inner, "model_type": text.kind},  # type: ignore[attr-defined]
            "vision_config": vision,
            "tie_word_embeddings": inner["tie_word_embeddings"],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default" if tower.before else "full",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        }

    def finish(
        self,
        config: dict[str, Any],
        outer: Mapping[str, Any],
        text: Mapping[str, Any],
        tokenizers: Mapping[str, ModalityTokenizer],
    ) -> dict[str, Any]:
        if TOKEN not in outer:
            raise UserError(
                "its text has no id that keeps the places of a picture, as an imported model has; "
                f"no {TOKEN} can be written"
            )
        made, inner = image_tokenizer(tokenizers).processed, config["text_config"]
        return {
            **config,
            **outer,
            "text_config": {**inner, **own_places(inner, text)},
            "vision_config": {**config["vision_config"], "image_size": made.size},
        }

    def beside(
        self, lm: LmConfig, tokenizers: Mapping[str, ModalityTokenizer], have: Mapping[str, bytes]
    ) -> dict[str, Any]:
        if WHOLE in have:  # as it came
            return {}
        adapter = require_tower(lm)
        made = image_tokenizer(tokenizers).processed
        return {FILE: write_pixels(made, adapter.inner, tower_like(adapter).processor)}

    # ---- both ----

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        adapter = require_tower(lm)
        for line in self._text_family(lm).entries(without_tower(lm)):
            yield line._replace(theirs=tuple(TEXT + name for name in line.theirs))
        ours = f"adapters.{IMAGE}"
        for line in tower_like(adapter).entries(adapter):
            own = tuple(f"{ours}.{name}" for name in line.own)
            yield line._replace(ours=own, theirs=tuple(TOWER + name for name in line.theirs))
        yield from both(f"{ours}.out.0", f"{PROJECTOR}.linear_1")
        yield from both(f"{ours}.out.2", f"{PROJECTOR}.linear_2")

    def _text_family(self, lm: LmConfig) -> Family:
        from mm.interchange.write import fitting  # which asks every family, this one among them

        return fitting(without_tower(lm))[0]

    def media(
        self, folder: Path, c: Settings, tokenizers: Mapping[str, ModalityTokenizer]
    ) -> Media:
        given = c.inside("vision_config", {})
        tower, made = tower_of(given), image_tokenizer(tokenizers).processed
        pixels = read_pixels(folder, tower.processor, made.size)
        raws = random_pictures(made.size, made.shorter)
        token = c.get(TOKEN, c.get("image_token_id"))
        if type(token) is not int:
            raise c.refuse(TOKEN, "is no id")
        shown = {"pixel_values": peer_pixels(folder, made, pixels, raws)}
        return Media(IMAGE, picture_values(made, raws), shown, token)


def tower_of(given: Settings) -> Vision:
    """The encoder that a vision config names. Raises UserError."""
    kind = given.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise given.refuse("model_type", f"is none of: {', '.join(TOWERS)}")
    tower = ENCODERS.parse(kind)
    assert isinstance(tower, Vision)
    return tower


def tower_like(adapter: EncoderAdapterConfig) -> Vision:
    """The encoder that an adapter is like."""
    tower = ENCODERS.parse(TOWERS[0] if adapter.input_norm is not None else TOWERS[1])
    assert isinstance(tower, Vision)
    return tower


def require_tower(lm: LmConfig) -> EncoderAdapterConfig:
    """The picture encoder of a model. Raises UserError where it has none, or other adapters."""
    adapter = lm.adapters.get(IMAGE)
    if len(lm.adapters) != 1 or not isinstance(adapter, EncoderAdapterConfig):
        raise UserError(f"model.adapters: not one encoder of '{IMAGE}' alone")
    return adapter


def without_tower(lm: LmConfig) -> LmConfig:
    """The decoder alone."""
    return lm.model_copy(update={"adapters": {}})


def image_tokenizer(tokenizers: Mapping[str, ModalityTokenizer]) -> ProcessedPatches:
    """What makes the pictures. Raises UserError where it is of another kind."""
    found = tokenizers.get(IMAGE)
    if not isinstance(found, ProcessedPatches):
        raise UserError(f"tokenizers/{IMAGE}: is no 'image_processed', which alone has an equal")
    return found
