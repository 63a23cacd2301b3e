"""What the families of tokenizers share, and those of sound. N samples, F frames, Q books."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part
from mm.specs import Waveform
from mm.tokenizers.quantizers.vq import EmaCodebook

PADDINGS = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate"}
MOST = 1024  # layers, books and strides that a config may ask for


class CodecReport(NamedTuple):
    """What a comparison of codes and of what they decode to found."""

    codes: int  # compared
    different: int  # of these
    difference: float  # the largest of two decoded values
    spread: float  # their standard deviation


class TokenizerFamily(Config):
    """Plug point: how one ``model_type`` of Hugging Face's layout is a tokenizer's network."""

    inside: ClassVar[str | None] = None  # key of a larger model's config that holds the tokenizer's
    prefixes: ClassVar[tuple[str, ...]] = ("",)  # of its names, one of which the folder uses
    network_kind: ClassVar[str] = "audio_codec"
    auto: ClassVar[str] = "AutoModel"  # class of `transformers` that loads it for the comparison
    # Keys of a config that say nothing of the mathematics, and names that hold nothing learned.
    silent_keys: ClassVar[frozenset[str]] = frozenset()
    silent: ClassVar[str] = r"$^"

    def build(self) -> TokenizerFamily:
        return self

    @abstractmethod
    def network(self, c: Settings, before: Settings, books: int | None) -> dict[str, Any]:
        """Values of our network's config.

        Args:
            c: config of the folder.
            before: its preprocessor's, empty where there is none.
            books: codebooks to use; None: as many as the config says.
        Raises:
            UserError: a key without an equal, by name.
        """

    @abstractmethod
    def entries(self, net: Any) -> Iterator[Entry]:
        """A line for each of our tensors; ``net``: config of our network."""

    def canonical(self, name: str) -> str:
        """The name that `entries` uses for a tensor of a folder."""
        return name

    def is_spare(self, net: Any, name: str) -> bool:
        """Whether a tensor belongs to books that are not used."""
        return False

    @abstractmethod
    def compare(self, tokenizer: Any, peer: Any) -> CodecReport:
        """Compare a loaded tokenizer with `transformers`' model (float32) of the same folder."""


class AudioFamily(TokenizerFamily):
    """Sound: what a preprocessor says, and the comparison."""

    def sampling_rate(self, c: Settings, before: Settings) -> int:
        """Hz. Raises UserError where the preprocessor does something else than the config says."""
        rate = c.whole("sampling_rate")
        if before.get("sampling_rate", rate) != rate:
            raise before.refuse("sampling_rate", f"is not that of config.json, {rate}")
        before.only("feature_size", 1)
        before.only("padding_value", 0.0)
        for key in ("chunk_length_s", "overlap"):
            if before.get(key) is not None:
                raise before.refuse(key, "has no equal here; only null has: signals are not cut")
        return rate

    @abstractmethod
    def their_codes(self, peer: Any, wave_N: Tensor, books: int) -> Tensor:
        """`(F, Q)` of `transformers`' model."""

    @abstractmethod
    def their_wave(self, peer: Any, codes_FQ: Tensor) -> Tensor:
        """`(N,)` of `transformers`' model."""

    @torch.no_grad()
    def compare(self, tokenizer: Any, peer: Any) -> CodecReport:
        """Codes in float64, as ours are always made; decoded samples in float32."""
        hop, rate = tokenizer.net.samples_per_frame, tokenizer.sample_rate
        rng = np.random.default_rng(17)
        wide, codes, different, apart, values = copy.deepcopy(peer).double(), 0, 0, 0.0, []
        for n in (40 * hop, 24 * hop + hop // 3 + 1, hop - 1):
            t = np.arange(n) / rate
            tone = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(80, rate / 4, 5)) / 8
            wave = (tone + 0.1 * rng.standard_normal(n)).astype(np.float32)
            own = torch.from_numpy(
                tokenizer.frames(tokenizer.encode([Waveform(wave, rate)])[0].ids)
            )
            given = torch.from_numpy(wave)
            theirs = self.their_codes(wide, given.double(), tokenizer.n_codebooks)
            if own.shape != theirs.shape:
                raise UserError(
                    f"{n} samples: {list(own.shape)} codes where transformers makes "
                    f"{list(theirs.shape)}; go on unchecked with --no-check"
                )
            codes, different = codes + own.numel(), different + int((own != theirs).sum())
            valid = torch.ones(1, len(own), dtype=torch.bool)
            mine = tokenizer.net.decode(theirs[None], valid)[0]
            wanted = self.their_wave(peer, theirs)
            apart = max(apart, float((mine[: len(wanted)] - wanted).abs().max()))
            values.append(wanted)
        return CodecReport(codes, different, apart, float(torch.cat(values).std()))


def books_in_use(c: Settings, all_books: int, usual: int, wanted: int | None) -> int:
    """How many codebooks the tokenizer has. Raises UserError where there are not so many."""
    if all_books > MOST:
        raise UserError(f"{c.origin}: asks for {all_books} codebooks; at most {MOST} are read")
    if wanted is not None and not 1 <= wanted <= all_books:
        raise UserError(f"--books {wanted}: {c.origin} has {all_books} codebooks; name 1 to them")
    return min(usual, all_books) if wanted is None else wanted


def strides_of(c: Settings, key: str) -> tuple[int, ...]:
    """Strides of the layers, as they stand. Raises UserError naming the key."""
    given = c[key]
    if (
        not isinstance(given, list)
        or not 0 < len(given) <= 16
        or any(type(n) is not int or not 0 < n <= MOST for n in given)
        or math.prod(given) > 2**20
    ):
        raise c.refuse(key, "is no list of strides")
    return tuple(given)


def whole_number(c: Settings, key: str, default: int | None = None, most: int = 2**20) -> int:
    """A positive whole number of at most ``most``. Raises UserError naming the key."""
    value = c.whole(key, default)
    if value > most:
        raise c.refuse(key, f"is more than {most}")
    return value


def flag(c: Settings, key: str) -> bool:
    """True or false. Raises UserError naming the key."""
    if type(c[key]) is not bool:
        raise c.refuse(key, "is neither true nor false")
    return c[key]


class Pointwise(Part):
    """A convolution of one tap as a matrix."""

    def join(self, given: Any) -> list[Tensor]:
        return [t.squeeze(-1) for t in given]


class Codebook(Part):
    """Codes and, where it is known, how often each was used; the rest of their training is new.

    ``sums``: the codes are stored as sums over what was assigned to each, at least ``floor``.
    """

    def __init__(self, sums: bool = False, floor: float = 1e-5):
        self.sums, self.floor = sums, floor

    def join(self, given: Any) -> list[Tensor]:
        codes, *rest = given
        used = rest[0] if rest else codes.new_zeros(len(codes))
        if self.sums:
            codes = codes / used.clamp(min=self.floor)[:, None]
        book = EmaCodebook(*codes.shape)
        book.init_weights()
        total = used.sum()
        size = used / total if total > 0 else book.size
        return [codes, size, book.probe, torch.ones((), dtype=torch.int64)]


def codebook_entry(ours: str, theirs: tuple[str, ...], part: Codebook) -> Entry:
    """All tensors of an `EmaCodebook`."""
    return Entry(tuple(f"{ours}.{n}" for n in ("codes", "size", "probe", "updates")), theirs, part)
