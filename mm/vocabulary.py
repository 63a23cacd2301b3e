"""The one id space of all modalities: append-only ranges, saved, hashed, checked at every load.

Ids 0..15 are reserved for control tokens. Then every range takes `begin, end, code 0, code 1, ...`,
in the order in
which it was added; adding a range moves no old id. A tokenizer with several codebooks is flattened:
code c of
book q is `q * vocab_size + c` inside the range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mm.errors import UserError, did_you_mean
from mm.reading import parse_json
from mm.specs import MODALITY, TokenSpec

SPECIALS = ("<|pad|>", "<|null|>", "<|document|>", "<|mask|>")
RESERVED = 16
PAD, NULL, DOCUMENT, MASK = range(4)


class _Spec(BaseModel):
    """A range as it may stand in a file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    modality: Annotated[str, Field(pattern=rf"^{MODALITY}$")]
    vocab_size: Annotated[int, Field(ge=0, lt=2**31, strict=True)]
    n_codebooks: Annotated[int, Field(ge=1, le=4096, strict=True)] = 1
    tokens_per_second: Annotated[float, Field(gt=0, strict=True)] | None = None
    grid: (
        Annotated[
            tuple[Annotated[int, Field(ge=1, le=2**20, strict=True)], ...],
            Field(min_length=1, max_length=4),
        ]
        | None
    ) = None
    continuous: Annotated[bool, Field(strict=True)] = False
    fingerprint: Annotated[str, Field(max_length=200)] = ""
    n_features: Annotated[int, Field(ge=0, lt=2**24, strict=True)] = 0
    inline: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _ids_or_values(self) -> _Spec:
        if (self.vocab_size == 0) != self.continuous or (self.n_features > 0) != self.continuous:
            raise ValueError("a modality has either ids (vocab_size) or values (n_features)")
        if self.inline and not self.continuous:
            raise ValueError("only values stand inline")
        return self


class _Ranges(BaseModel):
    """A vocabulary as it may stand in a file."""

    ranges: list[_Spec]
    specials: Annotated[list[str], Field(max_length=RESERVED)]


class Range(NamedTuple):
    """Where one modality's ids stand: ``begin``, ``end``, then codes ``first .. stop - 1``."""

    index: int  # modality number in Fields.modality: 1, 2, ...; 0 is none
    begin: int
    end: int
    first: int
    stop: int


class Vocabulary(NamedTuple):
    """Disjoint id ranges, one a modality. Immutable; `add` returns a longer one."""

    ranges: tuple[TokenSpec, ...] = ()
    specials: tuple[str, ...] = SPECIALS

    @property
    def size(self) -> int:
        return RESERVED + sum(spec.n_ids + 2 for spec in self.ranges)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(spec.modality for spec in self.ranges)

    @property
    def numbers(self) -> dict[str, int]:
        """Each modality's number in `Fields.modality`: 1, 2, .."""
        return {modality: i for i, modality in enumerate(self.modalities, start=1)}

    def add(self, spec: TokenSpec) -> Vocabulary:
        """Append a range.

        Raises UserError when the modality is there already with another fingerprint.
        """
        for old in self.ranges:
            if old.modality == spec.modality:
                if old == spec:
                    return self
                raise UserError(
                    f"vocabulary: modality '{spec.modality}' is taken by tokenizer "
                    f"{old.fingerprint[:12]}, not "
                    f"{spec.fingerprint[:12]}; give the new tokenizer another modality name"
                )
        return self._replace(ranges=(*self.ranges, spec))

    def spec(self, modality: str) -> TokenSpec:
        for spec in self.ranges:
            if spec.modality == modality:
                return spec
        raise UserError(
            f"vocabulary has no modality '{modality}'{did_you_mean(modality, self.modalities)}"
        )

    def range(self, modality: str) -> Range:
        """The ids of a modality. Raises UserError on an unknown one."""
        start = RESERVED
        for index, spec in enumerate(self.ranges, start=1):
            stop = start + 2 + spec.n_ids
            if spec.modality == modality:
                return Range(index, start, start + 1, start + 2, stop)
            start = stop
        raise UserError(
            f"vocabulary has no modality '{modality}'{did_you_mean(modality, self.modalities)}"
        )

    def modality_of(self, ids: np.ndarray) -> np.ndarray:
        """Modality number of each id (begin and end included).

        0 for control tokens and out-of- range ids.
        """
        borders = np.cumsum([RESERVED, *(spec.n_ids + 2 for spec in self.ranges)])
        index = np.searchsorted(borders, ids, side="right")
        return np.where((ids >= 0) & (ids < self.size), index, 0).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(
            {"specials": self.specials, "ranges": [spec.to_dict() for spec in self.ranges]},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, origin: str = "vocabulary") -> Vocabulary:
        """Read what `to_json` wrote.

        Raises UserError naming the first key that is wrong, or a modality that is there twice.
        """
        try:
            raw = parse_json(text)
            checked = _Ranges.model_validate(raw)
            names = [spec.modality for spec in checked.ranges]
            if len(set(names)) < len(names):
                raise ValueError(f"modality '{max(names, key=names.count)}' is there twice")
            specs = tuple(TokenSpec.from_dict(spec) for spec in raw["ranges"])
            vocabulary = cls(specs, tuple(checked.specials))
            if vocabulary.size >= 2**31:
                raise ValueError(f"{vocabulary.size} ids are more than fit into 32 bits")
            return vocabulary
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error)
        raise UserError(
            f"{origin}: not a vocabulary file ({why}); re-make it with: mm tokenizer train"
        )

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = parse_json(self.to_json()) | {"sha256": self.fingerprint}
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(body, indent=1))
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a saved vocabulary.

        Raises UserError when it is missing, unreadable or fails its hash.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"no vocabulary at {path}; make one with: mm data pack SRC --out DIR "
                "--tokenizers ..."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not a vocabulary file, or damaged ({error}); restore it from a backup"
            ) from error
        vocabulary = cls.from_json(text, str(path))
        if parse_json(text).get("sha256") != vocabulary.fingerprint:
            raise UserError(
                f"{path}: does not match its own hash; it was edited or damaged: restore it "
                "from a backup"
            )
        return vocabulary

    def require(self, used: Iterable[TokenSpec], origin: str) -> None:
        """Check that every range of ``origin`` (a shard, a checkpoint) is here at the same place.

        Raises UserError naming the modality and both fingerprints: wrong ids would train without
        any error.
        """
        mine = {spec.modality: spec for spec in self.ranges}
        for spec in used:
            have = mine.get(spec.modality)
            if have is None:
                raise UserError(
                    f"{origin}: uses modality '{spec.modality}' that this vocabulary lacks"
                )
            if have.fingerprint != spec.fingerprint:
                raise UserError(
                    f"{origin}: modality '{spec.modality}' was tokenised by "
                    f"{spec.fingerprint[:12]}, this vocabulary has "
                    f"{have.fingerprint[:12]}; pack it again with: mm data pack SRC --out DIR "
                    "--tokenizers ..."
                )

    def is_prefix_of(self, other: Vocabulary) -> bool:
        """True when every id of this vocabulary means the same in ``other``."""
        return (
            other.ranges[: len(self.ranges)] == self.ranges
            and other.specials[: len(self.specials)] == self.specials
        )


def extend_vocabulary(specs: Sequence[TokenSpec], old: Vocabulary | None = None) -> Vocabulary:
    """Append ``specs`` in order to ``old`` (or to an empty vocabulary)."""
    vocabulary = old or Vocabulary()
    for spec in specs:
        vocabulary = vocabulary.add(spec)
    return vocabulary
