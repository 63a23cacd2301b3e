"""A tokenizer: 8-bit mu-law samples, one id a sample, nothing to train. N samples.

    mm tokenizer train configs/tokenizer/text.yaml "imports=[examples.tokenizer_mu_law]" \
        "tokenizer={kind: mu_law}" --data SHARDS --out DIR

A saved folder does not say where its code is: `mm data pack --tokenizers` finds this one once it
stands in `mm/registry.py` or is announced by a package in the entry-point group ``mm.plugins``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mm.config import Config
from mm.data.modalities.audio import resample
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec, Waveform
from mm.tokenizers.load import fingerprint_of, load_tokenizer, write_folder

MU = 255


class MuLawTokenizer(ModalityTokenizer):
    """Waveform to 256 levels, finer where it is quiet.

    Source: ITU-T G.711; as model input: van den Oord et al. 2016 (arXiv:1609.03499), section 2.2.
    """

    def __init__(self, config: MuLawConfig):
        self.config = config
        rate = float(config.sample_rate)
        self.spec = TokenSpec(
            config.modality, MU + 1, tokens_per_second=rate, fingerprint=fingerprint_of(config)
        )

    def encode(self, raws: Sequence[Waveform]) -> list[Encoded]:
        """Ids `(N,)` int32 at the tokenizer's rate. Raises UserError on all but a Waveform."""
        out = []
        for raw in raws:
            if not isinstance(raw, Waveform):
                raise UserError(f"mu_law tokenizer: expected a Waveform, got {type(raw).__name__}")
            x = np.clip(resample(raw, self.config.sample_rate).samples, -1, 1)
            level = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
            out.append(Encoded(np.round((level + 1) / 2 * MU).astype(np.int32)))
        return out

    def decode(self, codes: Sequence[Encoded]) -> list[Waveform]:
        levels = [np.asarray(code.ids).reshape(-1) / MU * 2 - 1 for code in codes]
        samples = [np.sign(v) * np.expm1(np.abs(v) * np.log1p(MU)) / MU for v in levels]
        return [Waveform(x.astype(np.float32), self.config.sample_rate) for x in samples]

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)


@TOKENIZERS.register("mu_law")
class MuLawConfig(Config):
    """8-bit mu-law."""

    kind: Literal["mu_law"] = "mu_law"
    modality: str = "audio"
    sample_rate: int = 8000  # Hz

    def fit(self, texts: Iterable[Any] = ()) -> MuLawTokenizer:
        """Nothing to learn."""
        return MuLawTokenizer(self)

    def build(self, folder: str | Path | None = None) -> MuLawTokenizer:
        return MuLawTokenizer(self)

    @classmethod
    def smallest_tokenizer(cls) -> MuLawTokenizer:
        return cls().build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        cases = ((440, 800, 8000), (0, 1, 8000), (90, 333, 8000), (200, 500, 16000))
        wave = lambda hz, n, rate: 0.5 * np.sin(2 * np.pi * hz * np.arange(n) / rate)
        return [Waveform(wave(*c).astype(np.float32), c[2]) for c in cases]
