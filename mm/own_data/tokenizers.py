"""The tokenizer of each modality that a source has: sizes, codes, budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm.own_data.look import Found
from mm.own_data.plan import Chosen

SMALL_TEXT = 20_000_000  # bytes: up to here whole bytes are affordable
SIDES = (32, 64)  # pixels
CELLS = 8  # a side of the grid of codes
PIXELS, PATCH = "pixels", 8  # pictures of values beside those of codes; a patch's side
RUN: Mapping[str, Any] = {
    "engine": {"zero_stage": 1, "precision": "auto", "grad_clip": 1.0},
    "checkpoints": {"every": 250, "keep_last": 1},
    "callbacks": ["progress"],
}


class TokenizerPlan(NamedTuple):
    """One tokenizer: its config, ids a value takes at most, and about how long its training is."""

    modality: str  # of the tokens: bytes, text, image, audio
    config: Mapping[str, Any]
    longest: int  # ids of the longest value, begin and end included
    mean: float
    n_ids: int
    cpu_seconds: float


def of_text(found: Found, wanted: str, alone: bool) -> TokenizerPlan:
    """Bytes or byte-level BPE. ``wanted``: auto, bytes or bpe."""
    assert found.text is not None
    total, longest, mean = found.text.total, found.text.longest, found.text.mean
    if wanted == "auto":
        wanted = "bytes" if alone and total <= SMALL_TEXT else "bpe"
        why = (
            f"{size(total)} of text alone: any text has ids, and there is nothing to train"
            if wanted == "bytes"
            else f"{size(total)} of text: fewer ids a word make longer texts affordable"
        )
    else:
        why = "asked for with --text"
    if wanted == "bytes":
        config = {"tokenizer": {"kind": Chosen("bytes", why), "modality": "bytes"}}
        return TokenizerPlan("bytes", config, longest + 2, mean + 2, 258, 0)
    if found.classes is not None and longest <= 60:
        why = "captions are few words: each may become one id"
    # Measured on plays with 1,024 ids and on the quickstart's prose and code with 512.
    ids, of = (512, 2.0) if total < 300_000 else (1024, 2.4) if total < SMALL_TEXT else (4096, 3.2)
    vocab = Chosen(ids, f"at most, for {size(total)} of text")
    config = {"tokenizer": {"kind": Chosen("bpe", why), "modality": "text", "vocab_size": vocab}}
    per = longest / (of if longest > 200 else 1)  # a short text may be rare words: a byte an id
    return TokenizerPlan("text", config, round(per) + 2, mean / of + 2, ids + 2, 1 + total / 4e6)


def of_image(found: Found, packed: Path, side: int | None, minutes: float) -> TokenizerPlan:
    """A convolutional tokenizer with a grid of 8 x 8 codes, in colour where the pictures are."""
    assert found.image is not None
    seen, coloured = found.image.side, found.image.coloured > 0.01
    why = f"their shorter side is {seen} pixels (median)" if side is None else "asked for"
    size = side or (SIDES[0] if seen < 48 else SIDES[1])
    steps = max(100, round(100 * minutes * (SIDES[0] / size) ** 1.5))
    channels = Chosen(
        3 if coloured else 1,
        f"{found.image.coloured:.0%} of the pictures have colour" if coloured else "all are gray",
    )
    data: dict[str, Any] = {"kind": "items", "path": str(packed), "modality": "image"}
    data |= {"size": size, "gray": not coloured, "batch_size": 32}
    data["augment"] = (
        Chosen({"flip": 0.5}, "mirrored photographs are photographs")
        if coloured
        else Chosen(
            {"shift": 0.03, "scale": 0.05}, "gray pictures are moved, not mirrored: writing"
        )
    )
    config = {
        "name": "tokenizer-image",
        "model": {
            "kind": "image_vq",
            "size": Chosen(size, why),
            "channels": channels,
            "down": Chosen([size // CELLS], f"patches: a grid of {CELLS} x {CELLS} codes"),
            "widths": [64],
            "blocks": [2],
            "quantizer": {"kind": "fsq", "levels": Chosen([8, 6, 5], "240 codes a cell")},
        },
        "stages": [_stage(data, {"kind": "vq"}, 4.0e-3, [0.9, 0.98], 30, steps, minutes)],
        **RUN,
    }
    ids = CELLS * CELLS + 2
    seconds = steps * 0.045 * (size / SIDES[0]) ** 2
    return TokenizerPlan("image", config, ids, ids, 242, seconds)


def of_pixels(side: int) -> TokenizerPlan:
    """Patches of the same pictures as values, which a model reads and never writes."""
    why = "few pictures: a class is learnt from the pixels themselves, as codes lose some"
    config = {
        "tokenizer": {
            "kind": Chosen("image_patches", why),
            "modality": PIXELS,
            "patch": PATCH,
            "size": Chosen(side, "as the pictures of codes have"),
        }
    }
    ids = (side // PATCH) ** 2 + 2
    return TokenizerPlan(PIXELS, config, ids, ids, 2, 0)


def of_audio(found: Found, packed: Path, minutes: float) -> TokenizerPlan:
    """The codec of configs/tokenizer/audio.yaml: 25 frames a second of two codes."""
    assert found.audio is not None
    rate, steps = found.audio.rate, max(100, round(80 * minutes))
    why = (
        f"the recordings have {rate:,} Hz; the codec is measured at 16 kHz"
        if rate <= 16000
        else f"speech lies below 8 kHz; the recordings have {rate:,} Hz: for music raise it, and "
        "n_fft and hop with it"
    )
    crop = min(0.3, max(0.1, round(found.audio.seconds, 1)))
    data: dict[str, Any] = {"kind": "items", "path": str(packed), "modality": "audio"}
    data |= {"sample_rate": 16000, "batch_size": 16}
    data["crop_seconds"] = Chosen(crop, f"recordings last {found.audio.seconds:.1f} s (mean)")
    objective = {"kind": "codec", "windows": [256, 1024], "bypass_steps": round(0.15 * steps)}
    config = {
        "name": "tokenizer-audio",
        "model": {
            "kind": "audio_codec",
            "sample_rate": Chosen(16000, why),
            "frontend": {
                "kind": "mel", "n_mels": 64, "n_fft": 640, "hop": 160, "downsample": 4,
                "width": 96, "hidden": 288, "encoder_blocks": 1, "decoder_blocks": 1,
                "synthesis_blocks": 2,
            },
            "quantizer": {
                "kind": "rvq", "n_codebooks": 2, "codebook_size": 512, "d": 32, "decay": 0.95,
            },
        },
        "stages": [_stage(data, objective, 3.0e-3, [0.9, 0.95], 20, steps, minutes)],
        **RUN,
    }  # fmt: skip
    longest = 2 * round(25 * found.audio.longest + 1) + 2
    return TokenizerPlan("audio", config, longest, 50 * found.audio.seconds + 4, 1026, steps * 0.08)


def _stage(
    data: Mapping[str, Any], objective: Any, lr: float, betas: Any, warmup: int, steps: int,
    minutes: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "data": data,
        "objective": objective,
        "optimizer": {"kind": "adamw", "lr": lr, "betas": betas, "weight_decay": 0.01},
        "schedule": {"shape": "wsd", "warmup": warmup, "decay": 0.5},
        "budget": {"steps": Chosen(steps, f"about a tenth of {minutes:g} minutes")},
    }


def size(n: int) -> str:
    """Bytes for people."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= of:
            return f"{n / of:.1f} {unit}"
    return f"{n} bytes"
