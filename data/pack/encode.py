"""Raw values to tokens while packing: in batches, and each different file once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm.data.modalities.base import BadSample, Modality, table
from mm.data.shards.members import member_modality, segment_words, split_ordinal
from mm.data.shards.token_codec import MOST_AXES, VALUES
from mm.errors import UserError, did_you_mean
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.vocabulary import Vocabulary, extend_vocabulary

CACHE_BYTES = 512_000_000


def vocabulary_of(
    tokenizers: Mapping[str, ModalityTokenizer], old: Vocabulary | None
) -> Vocabulary:
    """Vocabulary of these tokenizers, appended to ``old``."""
    return extend_vocabulary([t.spec for t in tokenizers.values()], old)


class Item(NamedTuple):
    """One sample on its way through the encoders. ``raws``: member -> undecoded bytes."""

    raws: Mapping[str, bytes]
    rest: Any  # whatever the caller needs again


class Result(NamedTuple):
    """``encoded``: member -> codes; ``bad`` is the reason where it could not be encoded."""

    rest: Any
    encoded: dict[str, Encoded]
    bad: str = ""


class Encoder:
    """Encodes samples of several modalities.

    Remembers what it has encoded by the hash of the file's content.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, ModalityTokenizer],
        modalities: Mapping[str, Modality] | None = None,
    ):
        known = table()
        self.tokenizers = dict(tokenizers)
        self.modalities = dict(modalities or known.modalities)
        self.reads = {m: known.raw.get(m, m) for m in tokenizers}
        for modality, raw in self.reads.items():
            if raw not in self.modalities:
                raise UserError(
                    "tokenizers: no raw data can be read as "
                    f"'{modality}'{did_you_mean(modality, known.raw)}"
                )
        self.left_out: set[str] = set()  # raw modalities that no tokenizer reads
        self._cache: OrderedDict[tuple[str, bytes], Encoded] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what was encoded: a worker process begins with none."""
        return {**self.__dict__, "_cache": OrderedDict(), "_held": 0, "left_out": set()}

    def note(self, items: Sequence[Item]) -> None:
        """Remember the modalities of these items that no tokenizer reads."""
        for item in items:
            self.left_out |= set(map(member_modality, item.raws)) - set(self.reads.values())

    def encode(self, items: Sequence[Item]) -> list[Result]:
        """Encode a batch; one bad item does not touch the others."""
        bad: dict[int, str] = {}
        encoded: list[dict[str, Encoded]] = [{} for _ in items]
        self.note(items)
        members = [(n, s, *split_ordinal(s)) for n, item in enumerate(items) for s in item.raws]
        for modality, raw in self.reads.items():
            wanted: dict[bytes, list[tuple[int, str]]] = {}
            values: dict[bytes, Any] = {}
            for n, member, ordinal, found in members:
                if found != raw or n in bad:
                    continue
                data = items[n].raws[member]
                digest = hashlib.blake2b(data, digest_size=16).digest()
                wanted.setdefault(digest, []).append((n, ordinal + modality))
                if digest not in values and (modality, digest) not in self._cache:
                    try:
                        values[digest] = self.modalities[raw].read(data, self.tokenizers[modality])
                    except BadSample as error:
                        bad[n] = f"{segment_words(member)}{error}"
                        wanted[digest].pop()
            if values:
                spec = self.tokenizers[modality].spec
                for digest, code in zip(
                    values, self.tokenizers[modality].encode(list(values.values())), strict=True
                ):
                    kept = _values(code, spec) if spec.continuous else _ids(code, spec)
                    self._cache[modality, digest] = kept
                    self._held += _n_bytes(kept)
            for digest, found_at in wanted.items():
                for n, member in found_at:
                    encoded[n][member] = self._cache[modality, digest]
        while self._held > CACHE_BYTES and self._cache:
            _, old = self._cache.popitem(last=False)
            self._held -= _n_bytes(old)
        return [
            Result(
                item.rest,
                encoded[n],
                bad.get(n) or ("" if encoded[n] else "no modality that a tokenizer reads"),
            )
            for n, item in enumerate(items)
        ]


def _ids(code: Encoded, spec: TokenSpec) -> Encoded:
    """Codes as they are stored. Raises ValueError where one lies outside of its range."""
    ids = np.ascontiguousarray(np.asarray(code.ids).reshape(-1), np.int32)
    if len(ids) and (ids.min() < 0 or ids.max() >= spec.n_ids):
        raise ValueError(
            f"tokenizer '{spec.modality}' gave ids {ids.min()}..{ids.max()} outside "
            f"0..{spec.n_ids - 1}"
        )
    return Encoded(ids, side=plain(code.side))


def _values(code: Encoded, spec: TokenSpec) -> Encoded:
    """Values as they are stored. Raises ValueError where shape or type are not as promised."""
    values = np.ascontiguousarray(code.values)
    fits = values.dtype in VALUES and 2 <= values.ndim <= MOST_AXES
    if not fits or values.shape[-1] != spec.n_features:
        raise ValueError(
            f"tokenizer '{spec.modality}' gave {values.dtype} {values.shape}, not uint8, float16 "
            f"or float32 (L, {spec.n_features})"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"tokenizer '{spec.modality}' gave values that are not finite")
    return Encoded(values=values, side=plain(code.side))


def _n_bytes(code: Encoded) -> int:
    return (code.ids if code.values is None else code.values).nbytes + 200


def plain(value: Any) -> Any:
    """JSON-able copy of side information.

    Numpy and torch scalars and arrays become numbers and lists.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value
