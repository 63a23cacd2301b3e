"""Token ids that another program made: checked, and marked with their tokenizer's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.pack.encode import Item, Result
from mm.data.shards.members import member_modality, segment_words
from mm.errors import UserError
from mm.reading import parse_json
from mm.specs import Encoded, TokenSpec
from mm.tokenizers.load import load_tokenizers

FILE, CARD = "tokenizer.json", "tokenizer.yaml"  # of Hugging Face `tokenizers`; of this project
NO_IDS = ("truncation", "padding")  # parts of tokenizer.json that change no id


def token_specs(
    tokenizers: str | Path | Mapping[str, Any] | None, src: Path, modalities: Sequence[str]
) -> list[TokenSpec]:
    """Specs of the tokenizers that made the ids.

    Args:
        tokenizers: as for `pack`; or a ``tokenizer.json``, a folder with one, or modality -> one of
            these. None: the ``tokenizer.json`` beside ``src`` or in it.
        src: the table, or its folder.
        modalities: that the table's columns hold; () = "text".
    Raises:
        UserError: there is no tokenizer, or one file for several modalities.
    """
    wanted = list(modalities) or ["text"]
    if tokenizers is None:
        beside = [f / FILE for f in (src, src.parent) if (f / FILE).is_file()]
        if not beside:
            raise UserError(
                f"{src}: no {FILE} beside it; say which tokenizer made the ids: --tokenizers DIR"
            )
        tokenizers = beside[0]
    if isinstance(tokenizers, (str, Path)):
        path = Path(tokenizers)
        if _file(path) is None:
            own = {p.name: p for p in sorted(path.iterdir()) if p.is_dir()} if path.is_dir() else {}
            if any(_file(p) is not None for p in own.values()):
                tokenizers = {m: own[m] for m in wanted if m in own}
        elif len(wanted) > 1:
            raise UserError(
                f"{path}: one tokenizer for {' and '.join(wanted)}; give a folder of one "
                "sub-folder a modality with --tokenizers DIR"
            )
        else:
            tokenizers = {wanted[0]: path}
    if not isinstance(tokenizers, Mapping):
        return [t.spec for t in load_tokenizers(tokenizers).values()]
    files = {
        m: file
        for m, t in tokenizers.items()
        if isinstance(t, (str, Path)) and (file := _file(Path(t))) is not None
    }
    rest = {m: t for m, t in tokenizers.items() if m not in files}
    specs = [t.spec for t in load_tokenizers(rest).values()] if rest else []
    return [*specs, *(foreign_spec(file, m) for m, file in sorted(files.items()))]


def _file(path: Path) -> Path | None:
    """The foreign ``tokenizer.json`` that ``path`` is or holds; None for this project's folders."""
    if path.is_file():
        return path
    return path / FILE if (path / FILE).is_file() and not (path / CARD).is_file() else None


def foreign_spec(file: Path, modality: str) -> TokenSpec:
    """Spec of a Hugging Face ``tokenizer.json``: its ids, and a fingerprint of all that makes them.

    The fingerprint is that of the content, whatever the white space; truncation and padding do not
    count. Raises UserError on another file.
    """
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        vocab = values["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in values.get("added_tokens") or []]
        size = max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a tokenizer.json ({type(error).__name__}: {str(error)[:120]})"
        ) from error
    kept = {k: v for k, v in values.items() if k not in NO_IDS}
    mark = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return TokenSpec(modality, size, fingerprint=mark)


class TokenIds:
    """Stands for an `Encoder` where the values are ids already: only checks their range."""

    def __init__(self, specs: Sequence[TokenSpec]):
        self.tokenizers = {spec.modality: spec for spec in specs}
        self.left_out: set[str] = set()  # never any: other columns are refused

    def note(self, items: Sequence[Item]) -> None:
        """Nothing is left out; see `Encoder.note`."""

    def encode(self, items: Sequence[Item]) -> list[Result]:
        """``raws`` of an item are int32 codes, little-endian; see `mm.data.sources.base`."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Result:
        out: dict[str, Encoded] = {}
        for member, data in item.raws.items():
            modality = member_modality(member)
            ids, top = np.frombuffer(data, "<i4"), self.tokenizers[modality].n_ids
            if len(ids) and (ids.min() < 0 or ids.max() >= top):
                bad = int(ids[(ids < 0) | (ids >= top)][0])
                reason = f"{segment_words(member)}{modality}: id {bad} outside 0..{top - 1}"
                return Result(item.rest, {}, reason)
            out[member] = Encoded(ids)
        return Result(item.rest, out)
