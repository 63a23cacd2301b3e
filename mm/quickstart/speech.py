"""Speak text with espeak-ng, the library that PyPI's espeakng-loader ships, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mm.errors import UserError

# espeak-ng/speak_lib.h
_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: 0.5 ms a clip; retrieval mode (1) takes 18 ms
_RATE, _PITCH = 1, 3  # espeakRATE (words per minute), espeakPITCH (0-100)
_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

VOICES = (
    "en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan",
    "en+f2", "en+f4", "en-us+f3", "en-us+m3", "en+m7", "en-gb-scotland+f1",
)  # fmt: skip
RATES = (130, 155, 180, 205)
PITCHES = (25, 38, 50, 62, 75)


class Speaker:
    """One espeak-ng instance (the library is a singleton: keep one at a time)."""

    def __init__(self) -> None:
        try:
            import espeakng_loader

            self._lib: Any = ctypes.CDLL(espeakng_loader.get_library_path())
            data = espeakng_loader.get_data_path()
        except (ImportError, OSError) as error:
            raise UserError(
                f"espeak-ng cannot be loaded ({error}); mend with: pip install espeakng-loader"
            ) from error
        self.sample_rate = int(self._lib.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0))
        if self.sample_rate <= 0:
            raise UserError(
                "espeak-ng does not start; mend with: pip install --force-reinstall espeakng-loader"
            )
        # The breath of a voice is noise that the library seeds by the clock: without this the files
        # of two runs differ.
        self._lib.espeak_ng_SetRandSeed(1)
        self._voice = ""
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept: the library holds only a pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, wav: Any, n: int, _events: Any) -> int:
        if n > 0 and wav:
            self._chunks.append(np.ctypeslib.as_array(wav, (n,)).copy())
        return 0

    def say(self, text: str, voice: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """Return `(N,)` float32 in [-1, 1] at ``sample_rate``.

        Raises UserError on an unknown voice.
        """
        if voice != self._voice:
            if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
                raise UserError(f"espeak-ng has no voice '{voice}'")
            self._voice = voice
        self._lib.espeak_SetParameter(_RATE, rate_wpm, 0)
        self._lib.espeak_SetParameter(_PITCH, pitch, 0)
        self._chunks = []
        raw = text.encode() + b"\0"
        self._lib.espeak_Synth(raw, len(raw), 0, 0, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        if not self._chunks:
            raise UserError(f"espeak-ng said nothing for '{text}' with voice '{voice}'")
        return np.concatenate(self._chunks).astype(np.float32) / 32768.0

    def close(self) -> None:
        self._lib.espeak_Terminate()


@contextmanager
def speaker() -> Iterator[Speaker]:
    """A `Speaker`, closed at the end."""
    one = Speaker()
    try:
        yield one
    finally:
        one.close()


def trim(wave: np.ndarray, threshold: float = 0.004, margin: int = 320) -> np.ndarray:
    """Cut leading and trailing near-silence, keeping ``margin`` samples."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    return wave if loud.size == 0 else wave[max(0, loud[0] - margin) : loud[-1] + margin]
