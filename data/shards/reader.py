"""ShardSet: one split of packed shards, with O(1) access to any sample.

N samples.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.modalities.base import BadSample, get_modality, table
from mm.data.shards import index
from mm.data.shards.index import Index
from mm.data.shards.manifest import read_manifest
from mm.data.shards.maps import ShardBytes
from mm.data.shards.members import member_modality, members_of, segment_words, split_ordinal
from mm.data.shards.remote import cache_folder, fetch, is_url, join, read_small
from mm.data.shards.token_codec import decode_values
from mm.errors import Damaged, UserError, did_you_mean
from mm.reading import parse_json
from mm.specs import Encoded, Sample, TokenSpec
from mm.vocabulary import Vocabulary

VOCABULARY, INDEX, QUARANTINE = "vocabulary.json", "index.npz", "quarantine.jsonl"
CHECKED = 4096  # shards whose sizes are looked at when a split is opened; of more, when first read
HASHED = 1 << 28  # bytes of an index that is hashed when it is opened
log = logging.getLogger(__name__)


class ShardSet:
    """Random access to one split. Small sets are held in memory, larger ones are memory-mapped.

    Shards behind a URL are fetched when they are first read.
    """

    def __init__(self, root: Path, split: str, manifest: dict[str, Any], cache_mb: float, url: str):
        self.root, self.split, self.manifest, self.url = root, split, manifest, url
        self._entry = entry = manifest["splits"][split]
        if not url and len(entry["shards"]) <= CHECKED:
            for shard in range(len(entry["shards"])):
                self._local(shard)
        self.tokenizers: Mapping[str, Any] = {}  # those of bytes get files as they are
        self._contents = ShardBytes(self._path, self.n_bytes <= cache_mb * 1e6)
        self.index, self._hashed = self._load_index(entry)
        if len(self.index) != entry["samples"]:
            raise UserError(
                f"{root}/{split}: index has {len(self.index)} samples, the manifest "
                f"{entry['samples']}; run: mm data verify {root}"
            )
        self.modalities: tuple[str, ...] = tuple(manifest["modalities"])
        self.tokenized: bool = manifest["kind"] == "tokens"
        self.says_loss = "chat" in manifest.get("settings", {})  # see `mm.data.chat.loss`
        self.vocabulary: Vocabulary | None = None
        if self.tokenized:
            self.vocabulary = Vocabulary.load(self.small_file(VOCABULARY))
            if self.vocabulary.fingerprint != manifest["vocabulary"]["fingerprint"]:
                raise UserError(
                    f"{root / VOCABULARY}: is not the vocabulary these shards were made with; "
                    "restore it or pack again"
                )
        self._codes_of = [(spec, f"{spec.modality}.npy") for spec in self.specs]  # their entries
        self._kinds = [str(kind) for kind in self.index.kinds]
        self._members = {  # kind -> member
            kind: split_ordinal(kind)[0] + str(index.modality_of_kind(kind))
            for kind in self._kinds
            if index.modality_of_kind(kind) is not None and index.is_tokens(kind) == self.tokenized
        }
        # True where a sample may have several segments of one modality
        self.interleaved = any(split_ordinal(member)[0] for member in self._members.values())
        names = enumerate([spec.modality for spec in self.specs] or table().modalities)
        self._order = {name: n for n, name in names}  # of the values of a sample

    @classmethod
    def open(cls, root: str | Path, split: str = "train", cache_mb: float = 512) -> ShardSet:
        """Open one split.

        Args:
            root: folder with manifest.json, or its URL.
            split: "train", "val", "test" or another that the manifest names.
            cache_mb: a split up to this size is read into memory once; a larger one is mapped.
        Raises:
            UserError: no manifest, no such split, a shard that is missing or has another size.
        """
        manifest = read_manifest(root)
        if split not in manifest["splits"]:
            raise UserError(f"{root}: no split '{split}'{did_you_mean(split, manifest['splits'])}")
        if not is_url(root):
            return cls(Path(root), split, manifest, cache_mb, "")
        own = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        return cls(cache_folder() / "sets" / own, split, manifest, cache_mb, str(root))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def specs(self) -> tuple[TokenSpec, ...]:
        """Token ranges that the shards use; none if raw."""
        return self.vocabulary.ranges if self.vocabulary else ()

    @property
    def fingerprint(self) -> str:
        """Short hash of the split's content: the SHA-256 of all its shards."""
        parts = "".join(shard["sha256"] for shard in self._entry["shards"])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def key(self, i: int) -> str:
        return self.index.key(self._number(i))

    def lengths(self, modality: str) -> np.ndarray:
        """Length of that modality in each sample: (N,) int64; -1 = absent.

        Tokens in token shards, else what the modality counts: bytes, pixels, frames, ...
        """
        found = self.index.lengths.get(modality)
        return np.full(len(self), -1, np.int64) if found is None else found

    def having(self, modality: str) -> np.ndarray:
        """Numbers of the samples that have a modality, ascending int64."""
        return np.flatnonzero(self.lengths(modality) >= 0)

    def __getitem__(self, i: int) -> Sample:
        """Decode sample i: str, uint8 (H, W, 3), `Waveform`, or what another modality decodes to.

        Raises UserError naming shard and key.
        """
        i = self._number(i)
        values = {member: self._decoded(i, member, e) for member, e in self.members(i).items()}
        return Sample(self.index.key(i), self._where(i), values)

    def members(self, i: int) -> dict[str, int]:
        """Member -> number of its tar entry in the index, in the order of the segments of i."""
        found = []
        for kind, e in self._entries(i).items():
            if kind in self._members:
                ordinal, modality = split_ordinal(self._members[kind])
                found.append((ordinal, self._order.get(modality, len(self._order)), modality, e))
        return {ordinal + modality: e for ordinal, _, modality, e in sorted(found)}

    def value(self, i: int, member: str) -> Any:
        """Decode one value of sample i.

        Raises UserError naming shard and key; KeyError when it has no such member.
        """
        i = self._number(i)
        return self._decoded(i, member, self.members(i)[member])

    def _decoded(self, i: int, member: str, e: int) -> Any:
        if self.tokenized:
            raise UserError(f"{self.root}: token shards hold codes, see ShardSet.tokens, no files")
        try:
            modality, data = member_modality(member), bytes(self._bytes(e))
            return get_modality(modality).read(data, self.tokenizers.get(modality))
        except BadSample as error:
            raise UserError(
                f"{self._where(i)}: {segment_words(member)}{error}; run: mm data verify {self.root}"
            ) from error

    def raw(self, i: int, member: str) -> tuple[str, bytes] | None:
        """(extension, undecoded bytes) of a member of sample i, or None where it is absent.

        A modality names the first segment that has it.
        """
        for kind, e in self._entries(self._number(i)).items():
            have = self._members.get(kind)
            if have == member or (have and member_modality(have) == member):
                return split_ordinal(kind)[1], bytes(self._bytes(e))
        return None

    def each(self, modality: str) -> list[tuple[int, str]]:
        """(sample, member) of every value of a modality, in order."""
        having = self.having(modality).tolist()
        if not self.interleaved:
            return [(i, modality) for i in having]
        return [(i, member) for i in having for member in members_of(self.members(i), modality)]

    def segments(self, modality: str, samples: np.ndarray | None = None) -> np.ndarray:
        """Segments of that modality in each sample: (N,) int64; 0 or 1 if not interleaved.

        Of all samples, or of some that lie close together.
        """
        if not self.interleaved:
            lengths = self.lengths(modality)
            return ((lengths if samples is None else lengths[samples]) >= 0).astype(np.int64)
        return self.index.members_of(self._of(modality), samples)

    def meta(self, i: int) -> dict[str, Any]:
        """Metadata of sample i: labels and whatever else the source had."""
        return self._json(self._number(i), "json")

    def tokens(self, i: int, of: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Codes of sample i by member: (L,) int32 views, ids from 0.

        In vocabulary order; of an interleaved sample segment by segment. Of a continuous modality
        its values: (L, C), or a grid of more axes. ``of``: modalities to read; None: all.
        """
        out: dict[str, np.ndarray] = {}
        if self.interleaved:
            for member, e in self.members(self._number(i)).items():
                data = self._bytes(e)
                try:
                    n = index.n_codes(bytes(data[:128]), len(data))
                except BadSample as error:
                    raise self._damaged(f"entry {e}: {error}") from error
                spec = next(s for s in self.specs if s.modality == member_modality(member))
                out[member] = (
                    self._values(i, e, spec, n) if spec.continuous else self._codes(i, e, n)
                )
            return out
        found = self._entries(i)
        for spec, name in self._codes_of:
            e = found.get(name)
            if e is not None and (of is None or spec.modality in of):
                n = self.lengths(spec.modality).item(i)
                out[spec.modality] = (
                    self._values(i, e, spec, n) if spec.continuous else self._codes(i, e, n)
                )
        return out

    def _codes(self, i: int, e: int, n: int) -> np.ndarray:
        """The ``n`` codes of an entry, (n,) int32, as its index says."""
        data = self._bytes(e)
        if not 0 <= 4 * n <= len(data) or not (self._hashed or index.has_codes(data, n)):
            raise self._damaged(f"sample {i} has {n} codes in {len(data)} bytes")
        return data[len(data) - 4 * n :].view("<i4")

    def _values(self, i: int, e: int, spec: TokenSpec, n: int) -> np.ndarray:
        """The values of an entry at ``n`` places, (n, C), or a grid of more axes."""
        try:
            values = decode_values(self._bytes(e), spec.n_features)
        except BadSample as error:
            raise Damaged(
                f"{self._where(i)}: {spec.modality}: {error}; run: mm data verify {self.root}"
            ) from error
        if math.prod(values.shape[:-1]) != n:
            raise self._damaged(f"sample {i} has {n} places and values {values.shape}")
        return values

    def side(self, i: int) -> dict[str, Any]:
        """Side information of sample i by member."""
        return self._json(self._number(i), "side.json")

    def read_encoded(self, i: int) -> dict[str, Encoded]:
        """Tokens of sample i with the side information that decoding needs.

        Raises UserError on raw shards.
        """
        if not self.tokenized:
            raise UserError(
                f"{self.root}: raw shards have no tokens; make them with: mm data pack "
                f"{self.root} --out DIR --tokenizers DIR"
            )
        i = self._number(i)
        side = self.side(i)
        continuous = {spec.modality for spec in self.specs if spec.continuous}
        return {
            m: Encoded(None, found, side.get(m, {}))
            if member_modality(m) in continuous
            else Encoded(found, side=side.get(m, {}))
            for m, found in self.tokens(i).items()
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards of the split."""
        return sum(shard["bytes"] for shard in self._entry["shards"])

    def bytes_of(self, modality: str, most: int = 1 << 22) -> int:
        """Bytes of all files of one modality; of more files than ``most``, told by some of them."""
        return self.index.bytes_of(self._of(modality), most)

    def _of(self, modality: str) -> np.ndarray:
        """Which kinds of members are of a modality, (K,) bool."""
        found = [member_modality(self._members.get(kind, "")) == modality for kind in self._kinds]
        return np.array(found, bool)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of every shard, in order."""
        return [shard["samples"] for shard in self._entry["shards"]]

    @property
    def totals(self) -> dict[str, tuple[int, int]]:
        """Modality -> samples that have it, and the sum of their lengths."""
        return {m: (e["count"], e["total"]) for m, e in self._entry["lengths"].items()}

    def close(self) -> None:
        """Drop buffers and maps."""
        self._contents.clear()

    def _load_index(self, entry: Mapping[str, Any]) -> tuple[Index, bool]:
        """The index, and whether it is known to be what was packed.

        One that is too large to be hashed at every start is told by its size and its shapes; what
        it says of a sample is then held against the header of the sample's tokens.
        """
        said, shards = entry["index"], len(entry["shards"])
        if self.url:
            where = join(self.url, self.split, said["name"])
            return Index.load(fetch(where, said["sha256"], said.get("bytes")), shards), True
        path = self.root / self.split / said["name"]
        have = path.stat().st_size if path.is_file() else -1
        hashed = have <= HASHED or said.get("bytes") is None
        if index.sha256(path) == said["sha256"] if hashed and have >= 0 else have == said["bytes"]:
            try:
                return Index.load(path, shards), hashed
            except UserError as error:
                log.warning("%s", error)
        log.warning("%s is missing or damaged: reading all shards of '%s' again", path, self.split)
        return index.build([self._local(shard) for shard in range(shards)]), True

    def _damaged(self, what: str) -> Damaged:
        where = self.root / self.split / self._entry["index"]["name"]
        return Damaged(
            f"{where}: damaged ({what}); delete it, so that it is made anew from the shards, and "
            f"run: mm data verify {self.root}"
        )

    def _entries(self, i: int) -> dict[str, int]:
        """Kind -> number of the tar entry of sample i."""
        first, stop = self.index.start.item(i), self.index.start.item(i + 1)
        kinds = self.index.kind[first:stop].tolist()
        if not 0 <= first <= stop <= len(self.index.kind) or len(kinds) != stop - first:
            raise self._damaged(f"sample {i} has entries {first} to {stop}")
        if kinds and not 0 <= min(kinds) <= max(kinds) < len(self._kinds):
            raise self._damaged(f"sample {i} has a member of kind {max(kinds)}")
        return {self._kinds[k]: e for e, k in enumerate(kinds, first)}

    def small_file(self, *parts: str) -> Path:
        """Path of a file that is no shard; fetched where the set is behind a URL."""
        path = self.root.joinpath(*parts)
        if self.url:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part-{os.getpid()}")
            part.write_bytes(read_small(join(self.url, *parts)))
            part.replace(path)
        return path

    @property
    def paths(self) -> list[Path]:
        """Files of the shards, where they are local."""
        return [self.root / self.split / shard["name"] for shard in self._entry["shards"]]

    def _path(self, shard: int) -> Path:
        """Local path of a shard; fetched where the set is behind a URL."""
        if not self.url:
            return self._local(shard)
        entry = self._entry["shards"][shard]
        url = join(self.url, self.split, entry["name"])
        return fetch(url, entry["sha256"], entry["bytes"])

    def _local(self, shard: int) -> Path:
        """Path of a local shard. Raises UserError where it is missing or has another size."""
        entry = self._entry["shards"][shard]
        path = self.root / self.split / entry["name"]
        have = path.stat().st_size if path.is_file() else None
        if have == entry["bytes"]:
            return path
        what = f"has {have} bytes, the manifest says {entry['bytes']}"
        raise Damaged(
            f"{path}: {'is missing' if have is None else what}; restore it or pack again with: "
            f"mm data pack SRC --out {self.root} --overwrite"
        )

    def _number(self, i: int) -> int:
        if not -(n := len(self.index.start) - 1) <= i < n:
            raise IndexError(f"sample {i} of {n}")
        return int(i) % n

    def _bytes(self, e: int) -> np.ndarray:
        index, s = self.index, self.index.shard.item(e)
        if not 0 <= s < len(self._entry["shards"]):
            raise self._damaged(f"entry {e} is in shard {s} of {len(self._entry['shards'])}")
        buffer = self._contents(s)
        at, size = index.offset.item(e), index.size.item(e)
        if at < 0 or size < 0 or at + size > len(buffer):
            raise self._damaged(f"entry {e} is at {at} to {at + size} of {len(buffer)} bytes")
        return buffer[at : at + size]

    def _json(self, i: int, kind: str) -> dict[str, Any]:
        e = self._entries(i).get(kind)
        if e is None:
            return {}
        try:
            return parse_json(bytes(self._bytes(e)))
        except ValueError as error:
            raise Damaged(
                f"{self._where(i)}: its metadata is no JSON ({error}); run: "
                f"mm data verify {self.root}"
            ) from error

    def _where(self, i: int) -> str:
        shard = self._entry["shards"][self.index.shard[self.index.start[i]]]["name"]
        return f"{self.root.name}/{self.split}/{shard}:{self.index.key(i)}"
