"""Bytes to raw values, one function a modality. Headers are checked before anything is decoded.

Every fault of the input is a `BadSample`, which packing writes to the quarantine; nothing else may
come out of here.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from mm.specs import Waveform

# Extension of a shard member -> modality. Nothing else may stand in a shard; pickles least of all.
IMAGE_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
AUDIO_FORMATS = {
    "WAV": "wav",
    "WAVEX": "wav",
    "FLAC": "flac",
    "OGG": "ogg",
    "MP3": "mp3",
    "AIFF": "aiff",
}
EXTENSIONS = {
    "txt": "text",
    "png": "image",
    "jpg": "image",
    "jpeg": "image",
    "webp": "image",
    "bmp": "image",
    "gif": "image",
    "wav": "audio",
    "flac": "audio",
    "ogg": "audio",
    "mp3": "audio",
    "aiff": "audio",
}
NATIVE = frozenset(EXTENSIONS.values())


class BadSample(ValueError):
    """This sample cannot be used; the message is the reason."""


class Limits(NamedTuple):
    """What a single sample may cost, decided from its header."""

    max_pixels: int = 50_000_000
    max_seconds: float = 1800.0
    max_text_bytes: int = 16_000_000


LIMITS = Limits()


def decode_text(data: bytes, limits: Limits = LIMITS) -> str:
    """Decode strict UTF-8; a byte-order mark is dropped. Raises BadSample."""
    if len(data) > limits.max_text_bytes:
        raise BadSample(f"text: {len(data)} bytes, more than the cap of {limits.max_text_bytes}")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"text: no valid UTF-8 at byte {error.start}") from error


@contextmanager
def _open_image(data: bytes, limits: Limits) -> Iterator[tuple[str, Any]]:
    """Yield (extension, Pillow image) with nothing but the header read and checked."""
    from PIL import Image

    with ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)))
            width, height = image.size
            kind = IMAGE_FORMATS[str(image.format)]
        except (
            Exception
        ) as error:  # Pillow raises many types on hostile files: all are "unreadable"
            raise BadSample(f"image: unreadable header ({_line(error)})") from error
        if width < 1 or height < 1 or width * height > limits.max_pixels:
            raise BadSample(
                f"image: header says {width}x{height} pixels, the cap is {limits.max_pixels}"
            )
        yield kind, image


def image_header(data: bytes, limits: Limits = LIMITS) -> tuple[str, int, int]:
    """Read (extension, height, width) without decoding a pixel.

    Raises BadSample over the cap or off the allow-list.
    """
    with _open_image(data, limits) as (kind, image):
        return kind, image.height, image.width


def decode_image(data: bytes, limits: Limits = LIMITS) -> np.ndarray:
    """Decode to uint8 (H, W, 3) RGB.

    EXIF rotation is applied, alpha is laid over white, 16 bit is scaled, of an animation the first
    frame is taken. Raises BadSample.
    """
    height, width = _plain_jpeg(data)
    if 0 < height * width <= limits.max_pixels:
        pixels = _jpeg(data)
        if pixels is not None and pixels.shape[:2] == (height, width):
            return pixels
    with _open_image(data, limits) as (_, image):
        return _pixels(image)


def _plain_jpeg(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG of one or three channels whose header says no more than that.

    (0, 0) of everything else: whatever is unusual, or may ask to be turned, is Pillow's.
    """
    at, none = 2, (0, 0)
    if data[:2] != b"\xff\xd8":
        return none
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, body = data[at + 1], at + 4
        if kind in (0xC0, 0xC1, 0xC2):  # the frame: bits, height, width, channels
            if data[body] != 8 or data[body + 5] not in (1, 3):
                return none
            number = lambda i: int.from_bytes(data[i : i + 2], "big")
            return number(body + 1), number(body + 3)
        picture_of_many = kind == 0xE2 and data[body : body + 3] == b"MPF"
        # Tables, remarks and applications' own, but for APP1, which may hold an orientation.
        if picture_of_many or not (kind in (0xC4, 0xDB, 0xDD, 0xFE, 0xE0) or 0xE2 <= kind <= 0xEF):
            return none
        at = body - 2 + int.from_bytes(data[at + 2 : body], "big")
    return none


def _jpeg(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3), the bytes that Pillow would give in two thirds of its time; None where it
    cannot.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        pixels = decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        )
    except RuntimeError:
        return None
    assert isinstance(pixels, torch.Tensor)  # a list is what a list gives
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _pixels(image: Any) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        image.load()
        turned = image.getexif().get(0x0112, 1) != 1  # else it would only copy
        frame = ImageOps.exif_transpose(image) if turned else image
        if frame.mode.startswith("I") or frame.mode == "F":
            # Pillow's own conversion would clip 16 bit to white.
            wide = np.asarray(frame, dtype=np.float64)
            gray = np.clip(wide / 257.0 + 0.5, 0, 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if frame.mode in ("RGBA", "LA", "PA") or "transparency" in frame.info:
            frame = frame.convert("RGBA")
            below = Image.new("RGBA", frame.size, (255, 255, 255, 255))
            frame = Image.alpha_composite(below, frame)
        return np.array(frame if frame.mode == "RGB" else frame.convert("RGB"))
    except Exception as error:
        raise BadSample(f"image: {_line(error)}") from error


def _plain_wav(data: bytes, limits: Limits) -> tuple[int, np.ndarray] | None:
    """Sample rate and a view (frames, channels) int16 of a WAV of the simplest and commonest kind:
    16-bit PCM, its header 44 bytes. libsndfile, which calls back into Python for every read, takes
    several times as long as the samples themselves.

    None for any other file, and for one that there is anything to say about: libsndfile judges it.
    """
    if len(data) < 44 or data[:4] != b"RIFF" or data[8:16] != b"WAVEfmt " or data[36:40] != b"data":
        return None
    size, code, channels, rate, _, frame, bits = struct.unpack_from("<IHHIIHH", data, 16)
    (n,) = struct.unpack_from("<I", data, 40)
    plain = (size, code, bits) == (16, 1, 16) and 1 <= channels <= 64 and frame == 2 * channels
    if not plain or not 1000 <= rate <= 768_000 or n > len(data) - 44 or n % frame:
        return None
    if not 0 < n // frame <= limits.max_seconds * rate:
        return None
    return rate, np.frombuffer(data, "<i2", n // 2, 44).reshape(-1, channels)


@contextmanager
def _open_audio(data: bytes, limits: Limits) -> Iterator[Any]:
    """Yield an open `SoundFile` with nothing but the header read and checked."""
    import soundfile

    with ExitStack() as stack:
        try:
            info = stack.enter_context(soundfile.SoundFile(io.BytesIO(data)))
            kind, rate = str(info.format), int(info.samplerate)
            frames, channels = int(info.frames), int(info.channels)
        except Exception as error:
            raise BadSample(f"audio: unreadable header ({_line(error)})") from error
        if kind not in AUDIO_FORMATS:
            raise BadSample(
                f"audio: format {kind} is not one of "
                f"{', '.join(sorted(set(AUDIO_FORMATS.values())))}"
            )
        if not 1000 <= rate <= 768_000:
            raise BadSample(f"audio: header says {rate} Hz")
        if not 1 <= channels <= 64:
            raise BadSample(f"audio: header says {channels} channels")
        if frames < 1:
            raise BadSample("audio: no frames")
        if frames > limits.max_seconds * rate:
            raise BadSample(
                f"audio: header says {frames / rate:.0f} s, the cap is {limits.max_seconds:.0f} s"
            )
        yield info


def audio_header(data: bytes, limits: Limits = LIMITS) -> tuple[str, int, int]:
    """Read (extension, frames, sample rate) without decoding.

    Raises BadSample when the header is absurd or over the cap.
    """
    plain = _plain_wav(data, limits)
    if plain is not None:
        return "wav", len(plain[1]), plain[0]
    with _open_audio(data, limits) as info:
        return AUDIO_FORMATS[str(info.format)], int(info.frames), int(info.samplerate)


def decode_audio(data: bytes, limits: Limits = LIMITS) -> Waveform:
    """Decode to mono float32 in [-1, 1] at its own sample rate.

    Channels are averaged. Raises BadSample.
    """
    plain = _plain_wav(data, limits)
    if plain is not None:
        levels = plain[1].astype(np.float32) * np.float32(2.0**-15)
        return Waveform(levels[:, 0] if levels.shape[1] == 1 else levels.mean(axis=1), plain[0])
    with _open_audio(data, limits) as info:
        frames, rate = int(info.frames), int(info.samplerate)
        try:
            samples = info.read(dtype="float32", always_2d=True)
        except Exception as error:
            raise BadSample(f"audio: {_line(error)}") from error
    if len(samples) == 0:
        raise BadSample(f"audio: header says {frames} frames, there are none")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise BadSample("audio: samples are not finite")
    return Waveform(np.ascontiguousarray(np.clip(mono, -1.0, 1.0)), rate)


def resample(wave: Waveform, sample_rate: int) -> Waveform:
    """Change the sample rate by windowed-sinc interpolation.

    Returns ``wave`` itself when it has that rate.
    """
    if wave.sample_rate == sample_rate:
        return wave
    import torch
    from torchaudio.functional import resample as convert

    with torch.no_grad():
        out = convert(
            torch.from_numpy(np.ascontiguousarray(wave.samples)), wave.sample_rate, sample_rate
        )
    return Waveform(out.numpy(), sample_rate)


def decode(modality: str, data: bytes, limits: Limits = LIMITS) -> Any:
    """Decode by modality: str, uint8 (H, W, 3) or `Waveform`. Raises BadSample."""
    return {"text": decode_text, "image": decode_image, "audio": decode_audio}[modality](
        data, limits
    )


def check(modality: str, data: bytes, limits: Limits = LIMITS) -> tuple[str, int]:
    """Decode once to prove that it can be, and return (true extension, length).

    Bytes, pixels or audio frames.
    """
    if not data:
        raise BadSample(f"{modality}: empty file")
    if modality == "image":
        with _open_image(data, limits) as (kind, image):
            height, width, _ = _pixels(image).shape
        return kind, height * width
    if modality == "audio":
        kind, _, _ = audio_header(data, limits)
        return kind, len(decode_audio(data, limits).samples)
    decode_text(data, limits)
    return "txt", len(data)


def decode_json(data: bytes) -> dict[str, Any]:
    """Decode a metadata member. Raises BadSample."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BadSample(f"json: {_line(error)}") from error
    if not isinstance(value, dict):
        raise BadSample("json: the metadata member must be an object")
    return value


def decode_tokens(data: bytes) -> np.ndarray:
    """Decode a token member.

    Returns int32 (L,). Raises BadSample on another type or shape, and on pickles.
    """
    offset, count = tokens_header(data[:256], len(data))
    return np.frombuffer(data, "<i4", count, offset)


def tokens_header(head: bytes, size: int) -> tuple[int, int]:
    """Read (byte offset of the codes, number of codes) from the start of an .npy member.

    Raises BadSample.
    """
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:
        raise BadSample(f"tokens: not an .npy file ({_line(error)})") from error
    if (
        dtype != np.dtype("<i4")
        or len(shape) != 1
        or fortran
        or stream.tell() + 4 * shape[0] != size
    ):
        raise BadSample(f"tokens: expected int32 of one axis, found {dtype} {shape}")
    return stream.tell(), shape[0]


def encode_tokens(ids: np.ndarray) -> bytes:
    """Write codes as an .npy member without pickle. ``ids`` (L,) int."""
    out = io.BytesIO()
    np.lib.format.write_array(
        out, np.ascontiguousarray(ids, dtype="<i4"), version=(1, 0), allow_pickle=False
    )
    return out.getvalue()


def _line(error: Exception) -> str:
    text = re.sub(r"<_io\.BytesIO[^>]*>", "this file", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:160]}"
