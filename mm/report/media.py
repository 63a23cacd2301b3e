"""Files of a run as data URIs: pictures, audio with a spectrogram, text."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.modalities.base import Shown, show_file
from mm.data.modalities.heat_map import magma

MAX_PIXELS = 1600  # of the longer side: a report stays mailable
MAX_SOUND_BYTES = 3_000_000
FFT = 512


def figure(file: Path, caption: str = "", *, small: bool = False, strip: bool = False) -> str:
    """Return the HTML of one media file with a caption.

    A picture, playable audio over its spectrogram, or text. A ``strip`` is a wide picture, which
    scrolls rather than shrinks.
    """
    try:
        body = _body(file, small)
    except (
        Exception
    ) as error:  # a damaged sample must not cost the report: it is named in its place
        body = (
            f'<p class="broken">{escape(file.name)}: cannot be shown '
            f"({escape(type(error).__name__)})</p>"
        )
    label = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    if strip:
        return f'<figure class="media strip"><div class="scroll">{body}</div>{label}</figure>'
    return f'<figure class="media">{body}{label}</figure>'


def _body(file: Path, small: bool) -> str:
    shown = show_file(file)
    if shown.kind == "image":
        uri, width, height = picture(shown)
        # Small pictures are shown enlarged with visible pixels, at a whole factor.
        factor = max(1, min(8, (96 if small else 160) // max(width, height)))
        style = f'width="{width * factor}" height="{height * factor}"' if factor > 1 else ""
        kind = "pixels" if factor > 1 else ""
        return f'<img class="{kind}" src="{uri}" alt="{escape(file.stem, quote=True)}" {style}>'
    if shown.kind == "audio":
        samples, rate = load_audio(file)
        seconds = len(samples) / rate
        spectrum = (
            f'<img class="spectrogram" src="{spectrogram(samples)}" alt="spectrogram of '
            f'{escape(file.stem, quote=True)}">'
        )
        if len(shown.content) > MAX_SOUND_BYTES:
            return f"{spectrum}<p>{escape(file.name)}: {seconds:.1f} s, too long to embed</p>"
        uri = _uri(shown.content, f"audio/{shown.ending}")
        return f'{spectrum}<audio controls preload="metadata" src="{uri}"></audio>'
    text = shown.content
    return f"<blockquote>{escape(text[:600])}{'…' if len(text) > 600 else ''}</blockquote>"


def picture(shown: Shown) -> tuple[str, int, int]:
    """Return ``(data URI, width, height)`` in pixels; a large picture is scaled down."""
    from PIL import Image

    with Image.open(io.BytesIO(shown.content)) as image:
        image.load()
        width, height = image.size
        if max(width, height) <= MAX_PIXELS and shown.ending == "png":
            return _uri(shown.content, "image/png"), width, height
        copy = image.convert("RGB")
        copy.thumbnail((MAX_PIXELS, MAX_PIXELS))
        return _uri(_png(copy), "image/png"), *copy.size


def load_audio(file: Path) -> tuple[np.ndarray, int]:
    """Return mono ``samples`` (N,) float32 and the sample rate in Hz."""
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return samples.mean(axis=1), int(rate)


def spectrogram(samples: np.ndarray, *, columns: int = 320) -> str:
    """Return a log-magnitude spectrogram of ``samples`` (N,) as a PNG data URI.

    Low frequencies are below.
    """
    from PIL import Image

    samples = np.nan_to_num(np.asarray(samples, dtype=np.float32))
    if len(samples) < FFT:
        samples = np.pad(samples, (0, FFT - len(samples)))
    hop = max(32, -(-(len(samples) - FFT) // columns))
    starts = np.arange(0, len(samples) - FFT + 1, hop)
    frames = samples[starts[:, None] + np.arange(FFT)] * np.hanning(FFT)
    power = 20 * np.log10(np.abs(np.fft.rfft(frames, axis=1)) + 1e-6)
    level = np.clip((power - power.max() + 70) / 70, 0, 1)[:, ::-1].T  # 70 dB of range
    return _uri(_png(Image.fromarray(magma(level)).resize((columns, 96))), "image/png")


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
