"""Byte-level byte-pair encoding (Hugging Face `tokenizers`).

It has no special tokens: control lives outside the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.tokenizers.load import fingerprint_of, load_tokenizer, write_folder
from mm.tokenizers.text.words import Words


class BpeTokenizer(ModalityTokenizer):
    """Text to merged byte pairs and back, exactly.

    Nothing is normalised and no token is "added", so ``<|image|>`` in a text is eight characters of
    text. Half a surrogate pair, which no file can hold, becomes U+FFFD; two halves become their
    character.
    """

    def __init__(self, config: BpeConfig, inner: Tokenizer, words: Words | None = None):
        self.config, self.inner, self.words = config, inner, words or Words()
        if inner.get_added_tokens_decoder():
            raise UserError(
                f"{config.modality}: the BPE holds added tokens, which would be parsed inside user "
                "text; fit it again with: mm tokenizer train"
            )
        mark = fingerprint_of(config, self._files())
        self.spec = TokenSpec(config.modality, inner.get_vocab_size(), fingerprint=mark)

    def encode(self, raws: Sequence[str]) -> list[Encoded]:
        """Ids of each text. Raises UserError on anything but `str`."""
        for raw in raws:
            if not isinstance(raw, str):
                raise UserError(f"text tokenizer: expected str, got {type(raw).__name__}")
        found = self.inner.encode_batch(
            [well_formed(raw) for raw in raws], add_special_tokens=False
        )
        return [Encoded(np.asarray(one.ids, np.int32)) for one in found]

    def decode(self, codes: Sequence[Encoded]) -> list[str]:
        """Texts; bytes that are no UTF-8 (a generated character cut in half) become U+FFFD."""
        rows = [np.asarray(code.ids).reshape(-1).tolist() for code in codes]
        return self.inner.decode_batch(rows, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config, self._files(), beside=self.words.files())

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.inner.to_str(pretty=False).encode()}


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs joined, lone halves replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@TOKENIZERS.register("bpe")
class BpeConfig(Config):
    """Byte-level BPE; `fit` it on text."""

    kind: Literal["bpe"] = "bpe"
    modality: str = "text"
    vocab_size: Annotated[
        int, Field(ge=256, description="at most; fewer when the text has fewer pairs")
    ] = 4096
    min_frequency: Annotated[
        int, Field(ge=1, description="a pair seen less often is not merged")
    ] = 2

    def fit(self, texts: Iterable[str]) -> BpeTokenizer:
        """Learn the merges. Raises UserError when there is no text at all."""
        rows = iter(texts)
        first = next(rows, None)
        if first is None:
            raise UserError(
                "no text to fit a BPE on; check the data path and split of the tokenizer's YAML"
            )
        if not isinstance(first, str):
            raise UserError(
                f"a BPE reads text, and '{self.modality}' is none: "
                "take `kind: bytes`, which reads any file"
            )
        inner, words = _empty(), Words()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        every = (well_formed(text) for text in itertools.chain([first], rows))
        inner.train_from_iterator(words.watch(every), trainer)
        return BpeTokenizer(self, inner, words)

    def build(self, folder: str | Path) -> BpeTokenizer:
        """Read a saved one. Raises UserError when ``tokenizer.json`` is missing or unreadable."""
        file = Path(folder) / "tokenizer.json"
        try:
            inner = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"{file}: not a BPE file ({error}); fit it again with: mm tokenizer train"
            ) from error
        return BpeTokenizer(self, inner, Words.read(folder))

    @classmethod
    def smallest_tokenizer(cls) -> BpeTokenizer:
        """A trivially fitted instance for the laws."""
        return cls(vocab_size=280).fit(["the cat sat on the mat, the hat"] * 3)

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        return [
            "the cat",
            "",
            "\x00 a\r\n\ttab",
            "naïve 漢字 🙂 e\u0301",
            "say <|image|> and <|pad|>",
            " the  cat " * 40,
        ]


def _empty() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return inner
