"""`preprocessor_config.json`: how a folder's pictures and sound are made before its model reads.

Read where it is there, written on the way back; S pixels of a side.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm.errors import UserError
from mm.interchange.family import Settings
from mm.reading import parse_json

log = logging.getLogger(__name__)
FILE, WHOLE = "preprocessor_config.json", "processor_config.json"
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What each kind of image processor does where its file says nothing.
SQUARE = {"do_center_crop": False, "image_mean": HALF, "image_std": HALF}
USUAL: dict[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {**SQUARE, "resample": 2},
    "SiglipImageProcessor": {**SQUARE, "resample": 3},
    "CLIPImageProcessor": {
        "do_center_crop": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
    },
}


class Pixels(NamedTuple):
    """Pictures of ``size`` S; ``shorter`` as of the tokenizer `image_processed`."""

    size: int
    shorter: int | None
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> dict[str, Any]:
        """Settings of the adapter `linear`; none where its own scale, -1 to 1, is meant."""
        if self.mean == self.std == HALF:
            return {}
        return {"mean": self.mean, "std": self.std}

    def tokenizer(self, patch: int, **more: Any) -> dict[str, Any]:
        """Settings of the tokenizer `image_processed`."""
        own = {"size": self.size, "shorter": self.shorter, "resample": self.resample}
        return {"kind": "image_processed", "patch": patch, **own, **more}


def read_processor(folder: Path, inside: str) -> Settings | None:
    """Settings of a folder's processor; None without any.

    ``inside``: key of `processor_config.json`, which newer tools write, that may hold them.

    Raises UserError on a file that is no JSON object.
    """
    for name in (FILE, WHOLE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = parse_json(file.read_bytes())
            if not isinstance(values, dict):
                raise ValueError("no object")
        except (ValueError, OSError) as error:
            raise UserError(f"{file}: not valid JSON ({error}); copy it again") from None
        if name == WHOLE:
            values = values.get(inside)
        if isinstance(values, dict):
            return Settings(values, str(file))
    return None


def has_processor(folder: Path) -> bool:
    """Whether a folder says how its pictures are made."""
    return read_processor(folder, "image_processor") is not None


def read_pixels(folder: Path, usual: str, side: int) -> Pixels:
    """How pictures are made for a model of pictures of ``side`` pixels.

    ``usual``: class of the processor where nothing says it.

    Raises UserError naming the key that has no equal here.
    """
    c = read_processor(folder, "image_processor")
    if c is None:
        log.warning("%s: no %s: pictures are made as by a %s", folder, FILE, usual)
        c = Settings({}, f"{folder}: no {FILE}")
    kind = str(c.get("image_processor_type", usual)).removesuffix("Fast").removesuffix("Pil")
    c = c.with_usual(USUAL.get(kind, USUAL[usual]))
    for key in ("do_resize", "do_rescale"):
        c.only(key, True)
    c.only("do_pad", False)
    if abs(c.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise c.refuse("rescale_factor", "has no equal here; only 1/255 has")
    if c["resample"] not in RESAMPLE:
        raise c.refuse("resample", "has no equal here; only 2 (bilinear) and 3 (bicubic) have")
    crops = bool(c["do_center_crop"])
    size, shorter = _size(c, "size", side), None
    if crops:
        shorter, size = size, _size(c, "crop_size", side)
    whole = c.get("size", side)
    if crops and isinstance(whole, Mapping) and "shortest_edge" not in whole and shorter != size:
        raise c.refuse("size", "squeezes pictures before the middle is cut out: no equal here")
    if not crops and isinstance(whole, Mapping) and "shortest_edge" in whole:
        raise c.refuse("size", "makes pictures of many shapes, and places are learned for one")
    if crops and isinstance(whole, Mapping) and "shortest_edge" not in whole:
        shorter = None  # squeezed to the square that is cut out
    if size != side:
        raise c.refuse("crop_size" if crops else "size", f"is not image_size {side} of the model")
    return Pixels(size, shorter, RESAMPLE[c["resample"]], *_channels(c))


def read_sound(folder: Path, n_mels: int, places: int, stack: int) -> dict[str, Any]:
    """Settings of the tokenizer `whisper_mel` for an encoder of ``places`` of ``stack`` frames.

    Raises UserError naming the key that has no equal here.
    """
    c = read_processor(folder, "feature_extractor")
    if c is None:
        log.warning("%s: no %s: sound is read as by a WhisperFeatureExtractor", folder, FILE)
        c = Settings({}, f"{folder}: no {FILE}")
    c.only("feature_extractor_type", "WhisperFeatureExtractor")
    c.only("do_normalize", False)
    c.only("dither", 0.0)
    c.only("padding_value", 0.0)
    if c.get("feature_size", n_mels) != n_mels:
        raise c.refuse("feature_size", f"is not num_mel_bins {n_mels} of the model")
    rate, hop = c.whole("sampling_rate", 16000), c.whole("hop_length", 160)
    whole = places * stack * hop
    seconds = c.whole("chunk_length", max(1, whole // rate))
    if seconds * rate != whole:
        raise c.refuse("chunk_length", f"s are not the {places} places that the model reads")
    n_fft = c.whole("n_fft", 400)
    sizes = {"n_mels": n_mels, "n_fft": n_fft, "hop": hop, "stack": stack}
    return {"kind": "whisper_mel", "sample_rate": rate, "seconds": seconds, **sizes}


def write_pixels(made: Any, channels: Any, kind: str) -> dict[str, Any]:
    """The file of what is read: a tokenizer `image_processed`, and an adapter `linear`."""
    side = {"height": made.size, "width": made.size}
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": side if made.shorter is None else {"shortest_edge": made.shorter},
        "resample": next(n for n, word in RESAMPLE.items() if word == made.resample),
        "do_center_crop": made.shorter is not None,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(channels.mean or HALF),
        "image_std": list(channels.std or HALF),
        "do_convert_rgb": True,
    }


def _size(c: Settings, key: str, default: int) -> int:
    given = c.get(key, default)
    sides = {*given.values()} if isinstance(given, Mapping) else {given}
    if len(sides) != 1 or not all(type(side) is int and side > 0 for side in sides):
        raise c.refuse(key, "is not one side of a square in pixels")
    return sides.pop()


def _channels(c: Settings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not c.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    out = []
    for key in ("image_mean", "image_std"):
        given = c[key]
        given = [given] * 3 if isinstance(given, int | float) else given
        if not isinstance(given, list | tuple) or len(given) != 3:
            raise c.refuse(key, "is not three numbers")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in given):
            raise c.refuse(key, "is not three numbers")
        out.append(tuple(float(x) for x in given))
    if not all(x > 0 for x in out[1]):
        raise c.refuse("image_std", "is not positive")
    return out[0], out[1]
