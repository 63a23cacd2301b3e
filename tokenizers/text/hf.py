"""The tokenizer of somebody else's language model: a `tokenizer.json` as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.tokenizers.load import fingerprint_of, load_tokenizer, write_folder
from mm.tokenizers.text.bpe import well_formed

FILE = "tokenizer.json"
ORIGIN = "origin.json"  # what `mm import` knows of the model that `mm export` asks for
# What tools read beside it; they change no id.
BESIDE = (
    ORIGIN,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "processor_config.json",
)


class HfTokenizer(ModalityTokenizer):
    """Text to the ids of a model that was trained elsewhere.

    Special tokens that stand in a text are text, unless ``parse_special``. Ids between the
    tokenizer's own and ``vocab_size``, rows that fill up a table, decode to nothing. Whether a text
    comes back exactly is a matter of its own normaliser.
    """

    def __init__(self, config: HfConfig, source: bytes, beside: Mapping[str, bytes] | None = None):
        self.config, self.source, self.beside = config, source, dict(beside or {})
        try:
            inner = Tokenizer.from_str(source.decode())
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"{FILE}: not a tokenizer ({str(error)[:120]}); copy it again"
            ) from None
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = not config.parse_special
        self.inner = inner
        size = config.vocab_size
        if inner.get_vocab_size() > size:
            raise UserError(
                f"{FILE}: {inner.get_vocab_size()} ids, the model's table has {size} rows: they "
                "belong to different models"
            )
        mark = fingerprint_of(config, {FILE: source})
        self.spec = TokenSpec(config.modality, size, fingerprint=mark)

    def encode(self, raws: Sequence[str]) -> list[Encoded]:
        """Ids of each text. Raises UserError on anything but `str`."""
        for raw in raws:
            if not isinstance(raw, str):
                raise UserError(f"text tokenizer: expected str, got {type(raw).__name__}")
        found = self.inner.encode_batch([well_formed(r) for r in raws], add_special_tokens=False)
        return [Encoded(np.asarray(one.ids, np.int32)) for one in found]

    def decode(self, codes: Sequence[Encoded]) -> list[str]:
        rows = [np.asarray(code.ids).reshape(-1).tolist() for code in codes]
        return self.inner.decode_batch(rows, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config, {FILE: self.source}, beside=self.beside)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)


@TOKENIZERS.register("hf")
class HfConfig(Config):
    """A `tokenizer.json` that came with a model: `mm import` writes it."""

    kind: Literal["hf"] = "hf"
    modality: str = "text"
    vocab_size: Annotated[int, Field(gt=0, description="rows of the model's table")] = 1
    bos: int | None = Field(default=None, ge=0, description="id that begins a document")
    eos: list[int] = Field(default=[], description="ids that end one, the first when written")
    parse_special: bool = Field(
        default=False, description="read special tokens that stand in a text as such"
    )

    def build(self, folder: str | Path) -> HfTokenizer:
        """Read a saved one. Raises UserError when `tokenizer.json` is missing or unreadable."""
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: no {FILE}; import the model again with: mm import")
        beside = {n: (folder / n).read_bytes() for n in BESIDE if (folder / n).is_file()}
        return HfTokenizer(self, (folder / FILE).read_bytes(), beside)

    @classmethod
    def smallest_tokenizer(cls) -> HfTokenizer:
        """An instance for the laws, with a special token."""
        from mm.tokenizers.text.bpe import BpeConfig

        inner = BpeConfig.smallest_tokenizer().inner
        inner.add_special_tokens(["<|image|>"])
        size = inner.get_vocab_size() + 3
        return HfTokenizer(cls(vocab_size=size), inner.to_str().encode())

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        return ["the cat", "", "naïve 漢字 🙂 e\u0301", "say <|image|> and <|pad|>"]
