"""Raw data and tokens before torch.

Sample, Segment, TokenSpec, Encoded, and the two plug points that make them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, Field

NONE: Mapping[str, Any] = {}


class Sample(NamedTuple):
    """One raw item: modality -> raw value (str, bytes, uint8 (H, W, C), `Waveform`, ..)."""

    key: str
    source: str
    values: Mapping[str, Any]


class FileBytes(bytes):
    """A whole file of the modality ``kind``: other `bytes` are text."""

    kind: str

    def __new__(cls, data: bytes, kind: str) -> FileBytes:
        made = super().__new__(cls, data)
        made.kind = kind
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (bytes(self), self.kind)


class Waveform(NamedTuple):
    """Mono audio: ``samples`` (N,) float32 in [-1, 1] at ``sample_rate`` Hz."""

    samples: Any
    sample_rate: int


class Video(NamedTuple):
    """Moving pictures: ``frames`` (F, H, W, 3) uint8, ``rate`` of them a second."""

    frames: Any
    rate: float


class FloatArray(NamedTuple):
    """Numbers on a grid of one axis or more, such as depths: ``values`` float32 of any rank."""

    values: Any


MODALITY = r"[a-z][a-z0-9_]{0,31}"  # a regular expression: it becomes names of files


def _first_begins(delays: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    for modality, each in delays.items():
        if not each or each[0] != 0:
            raise ValueError(f"{modality}: the first codebook's delay must be 0")
    return delays


# Modality -> places that each of its codebooks waits, where one place holds a code of each
Delays = Annotated[
    dict[str, tuple[Annotated[int, Field(ge=0, le=1024)], ...]], AfterValidator(_first_begins)
]


class TokenSpec(NamedTuple):
    """What a tokenizer promises, without importing it. ``vocab_size`` is that of ONE codebook.

    One that gives values in place of ids is ``continuous``: it has no ids (``vocab_size`` 0), fills
    every place with ``n_features`` numbers, and an adapter of the model reads them. One
    that is ``inline`` stands inside the span of ids around it, without a begin or an end.
    """

    modality: str
    vocab_size: int
    n_codebooks: int = 1
    tokens_per_second: float | None = None
    grid: tuple[int, ...] | None = None
    continuous: bool = False
    fingerprint: str = ""
    n_features: int = 0
    inline: bool = False

    @property
    def n_ids(self) -> int:
        """Ids that the modality takes in a flattened stream."""
        return self.vocab_size * self.n_codebooks

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what only values have is left out of a spec of ids."""
        of_values = {"n_features": self.continuous, "inline": self.inline}
        return {k: v for k, v in self._asdict().items() if of_values.get(k, True)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TokenSpec:
        grid = raw.get("grid")
        return cls(**{**raw, "grid": tuple(grid) if grid else None})


class Encoded(NamedTuple):
    """Tokens of one item.

    ``ids`` (L,) int32 codes that start at 0, flattened book by book within a frame (book q adds q *
    vocab_size); of a continuous modality ``values`` (L, C) instead, or (rows, columns, C) of a
    grid; ``side``: what decode needs besides (length, size, scale).
    """

    ids: Any = None
    values: Any = None
    side: Mapping[str, Any] = NONE


class Segment(NamedTuple):
    """One modality's run in a sequence.

    ``ids`` are local codes (from 0); packing adds the vocabulary range, begin and end. (L, C) where
    each place holds a code of every codebook, -1 = none (transform `delay`).

    ``role`` is "target" (has loss), "condition" (has none; with ids None it is the null condition)
    or "label": ids that stand in no sequence, which a head predicts of the whole document.
    A continuous one has ``values`` (L, C), ``ids`` of -1 that keep their places, and the ``grid``
    that they are the cells of, if any. ``room`` is the number of places where the adapter does not
    fill one with each value.
    ``position`` (places, axes) int: axes 1, 2, .. of each place, from the segment's first on.
    ``fields``: name -> one integer, or one a place (`Fields.extra`).
    ``part`` "" is the main sequence, another name a second one of the same document.
    ``inline``: as of its `TokenSpec`.
    """

    modality: str
    ids: Any = None
    values: Any = None
    room: int = 0
    position: Any = None
    role: str = "target"
    weight: float = 1.0
    targets: Any = None
    fields: Mapping[str, Any] = NONE
    part: str = ""
    grid: tuple[int, ...] = ()
    inline: bool = False


class Transform(ABC):
    """Plug point of the data workers; the only thing that may change lengths.

    Pure in (segments, rng).
    """

    # True: what it does depends on modalities and lengths alone, not on the ids. A stage's start
    # can then tell from the index what it leaves out.
    by_length: ClassVar[bool] = False
    # What its segments add to a batch: then every batch has it, whatever its rows hold.
    makes_parts: Sequence[str] = ()  # names of second sequences
    makes_fields: Sequence[str] = ()  # names of fields
    makes_labels: Sequence[str] = ()  # modalities of label segments
    # Modalities whose codebooks it lays out in one place -> places that each one waits
    makes_codebooks: Mapping[str, tuple[int, ...]] = NONE

    @abstractmethod
    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        """Return the new segments, or None to filter the sample out.

        ``rng`` is a numpy Generator of this sample alone.
        """


class ModalityTokenizer(ABC):
    """Plug point: raw values to tokens and back.

    Saved as a folder; its fingerprint covers config and weights.
    """

    spec: TokenSpec
    reads_files: ClassVar[bool] = False  # its raw values are the bytes of files, undecoded

    @abstractmethod
    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Tokens of each raw value; ids in [0, spec.n_ids). A batch equals a loop."""

    @abstractmethod
    def decode(self, codes: Sequence[Encoded]) -> list[Any]:
        """Raw values of each code.

        Never raises on ids in range, whatever their length (generated ids are not perfect).
        """

    def code_vectors(self) -> Any:
        """`(spec.n_ids, C)` float32 vectors that say which codes are alike (a codebook), or None.

        They may seed embeddings.
        """
        return None

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.yaml`` (kind, modality, config) and the data files, atomically."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        """Read what `save` wrote. Raises UserError when a file is missing or was changed."""
