"""Index of tar shards: where every entry of every sample stands, as flat numpy arrays.

N samples, E entries.
"""

from __future__ import annotations

import hashlib
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

SAFE_MODALITY = re.compile(r"[a-z][a-z0-9_]{0,31}")


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
        return bytes(self.key_bytes[self.key_start[i] : self.key_start[i + 1]]).decode()

    def save(self, path: Path) -> None:
        """Write as .npz, without pickle."""
        arrays = {name: getattr(self, name) for name in self._fields if name != "lengths"}
        arrays |= {f"length_{modality}": values for modality, values in self.lengths.items()}
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Index:
        """Open without reading: arrays are views of the mapped file, so size costs nothing."""
        found = map_npz(path)
        lengths = {n.removeprefix("length_"): a for n, a in found.items() if n[:7] == "length_"}
        return cls(
            **{name: found[name] for name in cls._fields if name != "lengths"}, lengths=lengths
        )


def map_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz as read-only views of one memory map.

    Raises ValueError on a compressed or foreign member.
    """
    whole = np.memmap(path, np.uint8, mode="r")
    out: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {entry.filename} is compressed")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"{path}: npy version {version}")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                skip = file.tell()
            if dtype.hasobject:
                raise ValueError(f"{path}: {entry.filename} holds objects")
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


@lru_cache(maxsize=4096)
def n_codes(head: bytes, size: int) -> int:
    """Codes of a token member. Raises BadSample."""
    return tokens_header(head, size)[1]


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
                if length is None or what.endswith(".npy"):
                    file.seek(m.offset)
                    try:
                        if what.endswith(".npy"):
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


def sha256(path: Path) -> str:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
