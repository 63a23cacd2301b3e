"""Index of tar shards: where every entry of every sample stands, as flat numpy arrays.

N samples, E entries.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm.data.modalities.base import BadSample, get_modality, table
from mm.data.shards.members import split_ordinal
from mm.data.shards.token_codec import tokens_header
from mm.errors import UserError
from mm.reading import npy_header
from mm.specs import MODALITY

SEQUENTIAL = 1 << 28  # bytes of an index that may as well be read ahead
SAFE_MODALITY = re.compile(MODALITY)


class TarEntry(NamedTuple):
    """One regular file inside a tar: ``offset`` and ``size`` in bytes of its content."""

    name: str
    offset: int
    size: int


class Index(NamedTuple):
    """Entries of all shards of one split, grouped by sample.

    Sample i owns the entries start[i] .. start[i + 1] - 1.
    """

    kinds: np.ndarray  # (K,) str: what a member is: "txt", "jpg", "json", "image.npy", "side.json"
    start: np.ndarray  # (N + 1,) int64
    kind: np.ndarray  # (E,) int16 into kinds
    shard: np.ndarray  # (E,) int32
    offset: np.ndarray  # (E,) int64
    size: np.ndarray  # (E,) int64
    key_bytes: np.ndarray  # (...,) uint8: all keys, UTF-8, one after the other
    key_start: np.ndarray  # (N + 1,) int64
    lengths: dict[
        str, np.ndarray
    ]  # modality -> (N,) int64: tokens, else what the modality counts; -1 = absent

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.start) - 1

    def key(self, i: int) -> str:
        """Key of sample ``i``; a byte that is no UTF-8 becomes a replacement character."""
        at = self.key_start.item
        return self.key_bytes[at(i) : at(i + 1)].tobytes().decode(errors="replace")

    def members_of(self, kinds: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """Members of some ``kinds`` (K,) bool in every sample, (N,) int64.

        Of all samples, or of some that lie close together.
        """
        at = np.arange(len(self)) if samples is None else samples
        start = self.start[int(at.min()) : int(at.max()) + 2]
        inside = kinds[self.kind[int(start[0]) : int(start[-1])]]
        hits = np.concatenate([[0], np.cumsum(inside, dtype=np.int64)])[start - start[0]]
        return (hits[1:] - hits[:-1])[at - at.min()]

    def bytes_of(self, kinds: np.ndarray, most: int) -> int:
        """Bytes of all members of some kinds; of more than ``most``, told by some of them."""
        at = spread(len(self.kind), most)
        found = int(self.size[at][kinds[self.kind[at]]].sum())
        return found * len(self.kind) // max(1, len(at))

    def save(self, path: Path) -> None:
        """Write as .npz, without pickle."""
        arrays = {name: getattr(self, name) for name in self._fields if name != "lengths"}
        arrays |= {f"length_{modality}": values for modality, values in self.lengths.items()}
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, n_shards: int) -> Index:
        """Open without reading: arrays are views of the mapped file, so size costs nothing.

        Raises UserError when it is no index, or its columns do not fit each other.
        """
        try:
            found = map_npz(path)
            lengths = {n.removeprefix("length_"): a for n, a in found.items() if n[:7] == "length_"}
            columns = {name: found[name] for name in cls._fields if name != "lengths"}
            index = cls(**columns, lengths=lengths)
            index._check_shapes(n_shards)
            return index
        except KeyError as error:
            why = f"no column {error}"
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            why = str(error)
        raise UserError(f"{path}: not an index of shards ({why})")

    def _check_shapes(self, n_shards: int) -> None:
        """Raise ValueError where a column has another type, rank or length than the others need."""
        n, entries = len(self.start) - 1, len(self.kind)
        sizes = {"start": n + 1, "key_start": n + 1, "kind": entries, "shard": entries}
        sizes |= {"offset": entries, "size": entries}
        columns = [(name, getattr(self, name), size) for name, size in sizes.items()]
        columns += [(f"length_{m}", values, n) for m, values in self.lengths.items()]
        for name, column, size in columns:
            if column.ndim != 1 or column.dtype.kind != "i" or len(column) != size:
                raise ValueError(f"column {name} is {column.dtype} {column.shape}, not ({size},)")
        if n < 0 or self.kinds.ndim != 1 or self.kinds.dtype.kind != "U":
            raise ValueError("no samples or no kinds of members")
        if self.key_bytes.dtype != np.uint8 or self.key_bytes.ndim != 1:
            raise ValueError("keys are no bytes")
        ends = {"start": (self.start, entries), "key_start": (self.key_start, len(self.key_bytes))}
        for name, (column, end) in ends.items():
            if int(column[0]) != 0 or int(column[-1]) != end:
                raise ValueError(f"column {name} goes from {column[0]} to {column[-1]}, not {end}")
        if entries and not 0 <= int(self.shard[0]) <= int(self.shard[-1]) < n_shards:
            raise ValueError(f"it speaks of shard {self.shard[-1]} of {n_shards}")
        for kind in self.kinds.tolist():
            try:
                modality_of_kind(kind)
            except ValueError as error:
                raise ValueError(f"members '.{kind}' are not allowed in a shard") from error
        for modality in self.lengths:
            if not SAFE_MODALITY.fullmatch(modality):
                raise ValueError(f"'{modality}' is no name of a modality")

    def differences(self, other: Index) -> list[str]:
        """Names of the columns in which two indices differ; empty where they say the same."""
        names = sorted({*self.kinds.tolist(), *other.kinds.tolist()})
        kinds = [
            np.array([names.index(k) for k in i.kinds.tolist()], np.int16)[i.kind]
            for i in (self, other)
            if i.kind.size == 0 or 0 <= i.kind.min() <= i.kind.max() < len(i.kinds)
        ]
        out = [] if len(kinds) == 2 and np.array_equal(kinds[0], kinds[1]) else ["kind"]
        for name in ("start", "shard", "offset", "size", "key_start", "key_bytes"):
            if not np.array_equal(getattr(self, name), getattr(other, name)):
                out.append(name)
        for modality in sorted({*self.lengths, *other.lengths}):
            mine, theirs = self.lengths.get(modality), other.lengths.get(modality)
            if mine is None or theirs is None or not np.array_equal(mine, theirs):
                out.append(f"length_{modality}")
        return out


def map_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz as read-only views of one memory map.

    Raises ValueError on a compressed or foreign member.
    """
    whole = np.memmap(path, np.uint8, mode="r")
    if path.stat().st_size > SEQUENTIAL:  # samples are looked up here and there: read no neighbours
        whole._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    out: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {entry.filename} is compressed")
            with archive.open(entry) as file:
                try:
                    shape, _, dtype = npy_header(file)
                except ValueError as error:
                    raise ValueError(f"{path}: {entry.filename}: {error}") from error
                skip = file.tell()
            # Local header: 30 bytes, then name and extra field, whose lengths stand at 26 and 28.
            head = bytes(whole[entry.header_offset : entry.header_offset + 30])
            names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            start = entry.header_offset + 30 + names + skip
            count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            view = whole[start : start + count].view(np.ndarray)
            out[entry.filename.removesuffix(".npy")] = view.view(dtype).reshape(shape)
    return out


def tar_entries(path: str | Path) -> Iterator[TarEntry]:
    """List the regular files of an uncompressed tar, in order.

    Raises:
        UserError: not a tar, cut short, or an entry that no data set needs: a link, a device, a
            sparse file, a path that is absolute or climbs with "..".
    """
    path = Path(path)
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise UserError(
                        f"{path}: member '{entry.name}' is no plain file (link, device or "
                        "sparse): refused"
                    )
                parts = entry.name.replace("\\", "/").split("/")
                if entry.name.startswith("/") or ".." in parts or "\0" in entry.name:
                    raise UserError(
                        f"{path}: member '{entry.name}' points outside of its folder: refused"
                    )
                if entry.size < 0:
                    raise UserError(f"{path}: member '{entry.name}' has a size below 0: refused")
                if entry.offset_data + entry.size > total:
                    raise UserError(
                        f"{path}: cut short inside member '{entry.name}'; restore the file and "
                        "try again"
                    )
                yield TarEntry(entry.name, entry.offset_data, entry.size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable tar file ({error}); compressed tars must be unpacked first"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into (key, kind) as WebDataset does.

    At the first dot of its last path component.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def modality_of_kind(kind: str) -> str | None:
    """Modality of a member, None for metadata.

    Raises ValueError on a kind that no shard may hold.
    """
    if kind in ("json", "side.json"):
        return None
    kind = split_ordinal(kind)[1]
    found = table().extensions.get(kind)
    if found is not None:
        return found
    stem, _, suffix = kind.rpartition(".")
    if suffix == "npy" and SAFE_MODALITY.fullmatch(stem):
        return stem
    raise ValueError(kind)


def is_tokens(kind: str) -> bool:
    """True of a token member: "image.npy", "003.image.npy"; "npy" is a raw array.

    >>> is_tokens("image.npy"), is_tokens("npy"), is_tokens("003.npy")
    (True, False, False)
    """
    return split_ordinal(kind)[1].endswith(".npy")


@lru_cache(maxsize=4096)
def n_codes(head: bytes, size: int) -> int:
    """Codes of a token member, or its vectors of values. Raises BadSample."""
    return tokens_header(head, size).places


def has_codes(data: np.ndarray, n: int) -> bool:
    """Whether a token member (bytes,) says itself that it holds ``n`` codes."""
    try:
        return n_codes(bytes(data[:128]), len(data)) == n
    except BadSample:
        return False


def build(paths: Sequence[Path], known: Mapping[str, Mapping[str, int]] | None = None) -> Index:
    """Index shards, checking every name, kind and token header on the way.

    Args:
        paths: shards, in order.
        known: key -> modality -> length, where packing knows it already.
    Raises:
        UserError: a member that no shard may hold, a key that occurs twice, a damaged token member.
    """
    kinds: dict[str, int] = {}
    start, kind, shard, offset, size, keys = [0], [], [], [], [], []
    lengths: dict[str, dict[int, int]] = {}
    seen: set[str] = set()
    for number, path in enumerate(paths):
        key_now: str | None = None
        with open(path, "rb") as file:
            for m in tar_entries(path):
                key, what = split_name(m.name)
                try:
                    own = modality_of_kind(what)
                except ValueError as error:
                    raise UserError(
                        f"{path}: member '{m.name}': '.{what}' files are not allowed in a shard"
                    ) from error
                if key != key_now:
                    if key in seen:
                        raise UserError(
                            f"{path}: key '{key}' occurs twice; pack it again with: mm data pack "
                            "SRC --out DIR"
                        )
                    seen.add(key)
                    keys.append(key.encode())
                    start.append(start[-1])
                    key_now = key
                start[-1] += 1
                kind.append(kinds.setdefault(what, len(kinds)))
                shard.append(number)
                offset.append(m.offset)
                size.append(m.size)
                if own is None:
                    continue
                values = lengths.setdefault(own, {})
                length = (known or {}).get(key, {}).get(own)
                if length is None or is_tokens(what):
                    file.seek(m.offset)
                    try:
                        if is_tokens(what):
                            length = n_codes(file.read(128), m.size)
                        else:
                            length = get_modality(own).length(file.read(m.size))
                    except BadSample as error:
                        raise UserError(f"{path}: member '{m.name}': {error}") from error
                    if split_ordinal(what)[0]:  # of an interleaved sample: the sum of its segments
                        length += values.get(len(keys) - 1, 0)
                values[len(keys) - 1] = length
    n = len(keys)
    columns = {}
    for name, values in lengths.items():
        columns[name] = np.full(n, -1, np.int64)
        columns[name][list(values)] = list(values.values())
    return Index(
        np.array(list(kinds), dtype=np.str_),
        np.array(start, np.int64),
        np.array(kind, np.int16),
        np.array(shard, np.int32),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([0, *map(len, keys)]).astype(np.int64),
        columns,
    )


def spread(n: int, most: int, chunk: int = 4096) -> np.ndarray:
    """All of ``n`` numbers, or chunks of about ``most`` that lie evenly among them; ascending."""
    if n <= most:
        return np.arange(n)
    firsts = np.linspace(0, n - chunk, max(1, most // chunk)).astype(np.int64)
    return np.unique(firsts[:, None] + np.arange(chunk))


def sha256(path: Path) -> str:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
