"""Audio as tokens: a trained `AudioCodec` behind the interface of every modality.

F frames, Q books, K codes, D latent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec, Waveform
from mm.tokenizers.audio.codec import AudioCodec, AudioCodecConfig
from mm.tokenizers.audio.mel import resample
from mm.tokenizers.load import fingerprint, load_tokenizer


class AudioCodecTokenizer(ModalityTokenizer):
    """Waveforms of any sample rate to ids and back; all books of a frame stand in a row.

    Encoding runs in float64: rounding then differs by 1e-15 between batch shapes, thread counts and
    processors, and an id flips only when two codes are equally near to that precision. So a batch
    equals a loop, and a shard packed on one machine equals that of another.
    """

    def __init__(self, config: AudioCodecTokenizerConfig, net: AudioCodec, mark: str | None = None):
        self.config, self.net = config, net.eval().requires_grad_(False)
        self.sample_rate = net.config.sample_rate
        self.n_codebooks, self.codebook_size = (
            net.quantizer.n_codebooks,
            net.quantizer.codebook_size,
        )
        self.spec = TokenSpec(
            config.modality,
            self.codebook_size,
            self.n_codebooks,
            tokens_per_second=self.n_codebooks * net.config.frames_per_second,
            fingerprint=mark or net.fingerprint(config),
        )
        self._wide: AudioCodec | None = None

    def encode(self, raws: Sequence[Waveform]) -> list[Encoded]:
        """Ids (F * Q,) int32 of each waveform; side: n_samples at the codec's rate.

        Raises UserError on a value that is no mono waveform.
        """
        waves = [self._samples(raw) for raw in raws]
        if self._wide is None:
            self._wide = copy.deepcopy(self.net).double()
        codes = [Encoded(np.zeros(0, np.int32), side={"n_samples": 0}) for _ in waves]
        books = torch.arange(self.n_codebooks) * self.codebook_size
        with torch.no_grad():
            for part in self._batches([len(w) for w in waves]):
                length = torch.tensor([len(waves[i]) for i in part])
                padded = torch.nn.utils.rnn.pad_sequence(
                    [waves[i].double() for i in part], batch_first=True
                )
                if padded.shape[1] == 0:  # nothing but empty clips
                    continue
                device = self.net.quantizer.device
                ids = self._wide.encode(padded.to(device), length.to(device)).cpu()
                for row, i in zip(ids, part, strict=True):
                    n = len(waves[i])
                    flat = row[: -(-n // self.net.samples_per_frame)] + books
                    codes[i] = Encoded(
                        flat.reshape(-1).to(torch.int32).numpy(), side={"n_samples": n}
                    )
        return codes

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Indices of what is encoded at once: equal lengths, where others would change the ids."""
        groups: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            groups.setdefault(n if self.net.frontend.whole_items else 0, []).append(i)
        size = self.config.batch_size
        return [g[at : at + size] for g in groups.values() for at in range(0, len(g), size)]

    def decode(self, codes: Sequence[Encoded]) -> list[Waveform]:
        """Waveforms at the codec's rate, cut to side's n_samples where that is known.

        Generated ids need not be whole frames: a frame may lack its later books (it decodes
        coarser); ids that come before a frame's first book, and negative or too large ones, are
        skipped.
        """
        waves: list[Waveform] = []
        for code in codes:
            frames = self.frames(code.ids)
            wave = np.zeros(0, np.float32)
            if len(frames):
                with torch.no_grad():
                    ids = torch.from_numpy(frames)[None].to(self.net.quantizer.device)
                    valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
                    wave = self.net.decode(ids, valid)[0].clamp(-1, 1).float().cpu().numpy()
            n = code.side.get("n_samples")
            waves.append(Waveform(wave if n is None else wave[: max(0, int(n))], self.sample_rate))
        return waves

    def frames(self, ids: Any) -> np.ndarray:
        """Flattened ids (L,) to frames (F, Q) int64, -1 where a book is missing.

        See `decode` for what is skipped.
        """
        Q, K = self.n_codebooks, self.codebook_size
        rows: list[list[int]] = []
        last = Q  # the book seen last in the open frame; Q = no frame is open
        for value in np.asarray([] if ids is None else ids, np.int64).reshape(-1).tolist():
            if not 0 <= value < Q * K:
                continue
            book, code = divmod(value, K)
            if book == 0:
                rows.append([code] + [-1] * (Q - 1))
            elif book == last + 1:
                rows[-1][book] = code
            else:
                continue
            last = book
        return np.asarray(rows, np.int64).reshape(-1, Q)

    def code_vectors(self) -> np.ndarray:
        """(Q * K, D) float32 codes, book by book."""
        return self.net.quantizer.code_vectors().detach().float().cpu().numpy()

    def save(self, folder: str | Path) -> None:
        self.net.save_pretrained(folder, card=self.config)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)

    def _samples(self, raw: Any) -> Tensor:
        """Mono float32 samples (N,) at the codec's rate."""
        try:
            samples, rate = (
                torch.as_tensor(np.asarray(raw.samples, np.float32)),
                int(raw.sample_rate),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config.modality} tokenizer: expected a Waveform, got {type(raw).__name__}"
            ) from error
        if samples.dim() != 1 or rate <= 0:
            raise UserError(
                f"{self.config.modality} tokenizer: expected mono samples (N,) at a positive rate, "
                f"got {tuple(samples.shape)} at {rate} Hz; mix the channels down first"
            )
        if not bool(torch.isfinite(samples).all()):
            raise UserError(
                f"{self.config.modality} tokenizer: the waveform holds NaN or infinite samples"
            )
        return resample(samples, rate, self.sample_rate) if len(samples) else samples


@TOKENIZERS.register("audio_codec")
class AudioCodecTokenizerConfig(Config):
    """A trained audio codec.

    The network's own config and weights stand beside ``tokenizer.yaml``.
    """

    kind: Literal["audio_codec"] = "audio_codec"
    modality: str = "audio"
    batch_size: Annotated[int, Field(gt=0, description="waveforms encoded at a time")] = 16

    def build(self, folder: str | Path) -> AudioCodecTokenizer:
        """Read a saved one. Raises UserError when a file is missing or does not fit."""
        return AudioCodecTokenizer(self, AudioCodec.from_pretrained(folder), fingerprint(folder))

    @classmethod
    def smallest_tokenizer(cls) -> AudioCodecTokenizer:
        """An untrained instance for the laws."""
        from mm.model.layer import init_weights

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = AudioCodecConfig.smallest().build()
            init_weights(net)
        return AudioCodecTokenizer(cls(batch_size=3), net)

    @classmethod
    def examples(cls) -> list[Waveform]:
        """Tones and noise of several lengths, an empty clip, and another sample rate."""
        rng = np.random.default_rng(0)
        tone = lambda n, rate, hz: (0.4 * np.sin(2 * np.pi * hz * np.arange(n) / rate)).astype(
            np.float32
        )
        return [
            Waveform(tone(6400, 16000, 220.0), 16000),
            Waveform(tone(3001, 16000, 700.0), 16000),
            Waveform((0.1 * rng.standard_normal(9999)).astype(np.float32), 16000),
            Waveform(tone(5512, 22050, 440.0), 22050),
            Waveform(np.zeros(1, np.float32), 16000),
            Waveform(np.zeros(0, np.float32), 16000),
        ]
