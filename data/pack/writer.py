"""Write shards: WebDataset tars, their index and the manifest.

Everything goes to a temporary folder that is renamed when it is complete.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tarfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mm.data.shards import index
from mm.data.shards.manifest import MANIFEST
from mm.data.shards.reader import INDEX
from mm.disk import is_full
from mm.errors import UserError
from mm.processes import is_alive

PROGRESS, SAMPLES = "progress.json", "samples.jsonl"  # of an unfinished pack


def secure_webdataset() -> types.ModuleType:
    """Import webdataset with pickles, `pipe:` and remote shells off, whoever imported it before."""
    os.environ.setdefault("WDS_SECURE", "1")
    import webdataset

    utils: Any = importlib.import_module("webdataset.utils")
    utils.enforce_security = True
    return webdataset


def safe_key(name: str) -> str:
    """Make a name usable as a WebDataset key.

    Injective: dots, blanks and control characters become %XX.

    >>> safe_key("cats/photo.v1")
    'cats/photo%2Ev1'
    """
    parts = [p for p in name.replace("\\", "/").split("/") if p not in ("", ".", "..")]
    key = quote("/".join(parts), safe="/-_+=,@()~!").replace(".", "%2E")
    if len(key) <= 80:
        return key or "sample"
    import hashlib

    return key[:60].rstrip("/%") + "-" + hashlib.sha256(name.encode()).hexdigest()[:16]


class SplitWriter:
    """Shards of one split. A new shard begins when the current one would pass ``shard_mb``.

    Written byte for byte as webdataset's `TarWriter` would, but at offsets that are known, so that
    a pack can go on where a killed one stopped.
    """

    def __init__(self, folder: Path, shard_mb: float):
        self.folder, self.limit = folder, int(shard_mb * 1e6)
        self.shards: list[dict[str, Any]] = []
        self.lengths: dict[str, dict[str, int]] = {}
        self.samples = self._bytes = 0
        self._file: Any = None
        self._tar: tarfile.TarFile | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, files: Mapping[str, bytes], lengths: Mapping[str, int]) -> None:
        """Append one sample: ``files`` maps kind ("txt", "image.npy", ...) to content."""
        need = sum(512 + (len(data) + 511) // 512 * 512 for data in files.values())
        if self._tar is None or (self._bytes and self._bytes + need > self.limit):
            self._finish_shard()
            self.shards.append({"name": f"shard-{len(self.shards):06d}.tar", "samples": 0})
            self._open("wb")
        assert self._tar is not None
        for kind in sorted(files):
            info = tarfile.TarInfo(f"{key}.{kind}")
            info.size, info.mtime, info.mode = len(files[kind]), 0, 0o444
            info.uname, info.gname = "bigdata", "bigdata"
            data = files[kind]
            block = _header(info) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)
            self._file.write(block)
            self._tar.offset += len(block)
        self._bytes += need
        self.samples += 1
        self.shards[-1]["samples"] += 1
        self.lengths[key] = dict(lengths)

    def state(self) -> dict[str, Any]:
        """Flush to the disk, and say where this split stands. JSON-able."""
        at = 0
        if self._tar is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            at = self._file.tell()
        return {
            "shards": [dict(s) for s in self.shards],
            "samples": self.samples,
            "bytes": self._bytes,
            "at": at,
        }

    def restore(self, state: Mapping[str, Any], lengths: Mapping[str, dict[str, int]]) -> None:
        """Go on from a `state`: what was written after it is cut off."""
        self.shards = [dict(s) for s in state["shards"]]
        self.samples, self.lengths = state["samples"], dict(lengths)
        known = {s["name"] for s in self.shards}
        for stray in self.folder.iterdir():
            if stray.name not in known:
                stray.unlink()
        if state["at"]:
            self._open("r+b", state["at"])
        self._bytes = state["bytes"]

    def _open(self, mode: str, at: int = 0) -> None:
        self._file = open(self.folder / self.shards[-1]["name"], mode)  # noqa: SIM115
        self._file.truncate(at)
        self._file.seek(at)
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115
        self._tar.offset = at  # it pads the end to whole records of the file, not of this session
        self._bytes = 0

    def _finish_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = self._file = None

    def finish(self) -> dict[str, Any]:
        """Close, hash and index. Returns this split's entry of the manifest."""
        self._finish_shard()
        paths = [self.folder / shard["name"] for shard in self.shards]
        for path, shard in zip(paths, self.shards, strict=True):
            shard |= {"bytes": path.stat().st_size, "sha256": index.sha256(path)}
        built = index.build(paths, self.lengths)
        built.save(self.folder / INDEX)
        summary, histograms = {}, {}
        for modality, values in sorted(built.lengths.items()):
            have = values[values >= 0]
            histograms[modality] = histogram(have)
            summary[modality] = {
                "count": len(have),
                "total": int(have.sum()),
                "min": int(have.min()),
                "max": int(have.max()),
            }
        return {
            "samples": self.samples,
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "lengths": summary,
            "histograms": histograms,
            "shards": self.shards,
            "index": {
                "name": INDEX,
                "bytes": (self.folder / INDEX).stat().st_size,
                "sha256": index.sha256(self.folder / INDEX),
            },
        }

    def abort(self) -> None:
        """Close what is open; the folder is about to be removed."""
        self._finish_shard()


def _header(info: tarfile.TarInfo) -> bytes:
    """What `TarFile.addfile` writes, without its search for values that a plain header lacks."""
    if len(info.name) <= tarfile.LENGTH_NAME and info.name.isascii():
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Counts by power of two: "64" counts lengths 64..127; "0" those of 0."""
    power = np.where(lengths > 0, 2 ** np.floor(np.log2(np.maximum(lengths, 1))), 0)
    values, counts = np.unique(power.astype(np.int64), return_counts=True)
    return {str(v): int(n) for v, n in zip(values, counts, strict=True)}


@contextmanager
def atomic_folder(out: Path, identity: str = "") -> Iterator[Path]:
    """Yield a folder beside ``out`` that takes its place when the block ends well.

    It vanishes when the block fails with an error; an interrupted or killed block leaves it.

    What a killed run left behind is removed first, unless it has a `PROGRESS` file of the same
    ``identity``: then the folder is that one, to go on with. ``out`` itself is never seen half
    written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.part-"
    part = out.parent / f"{prefix}{os.getpid()}"
    for stale in sorted(out.parent.glob(f"{prefix}*")):
        pid = re.fullmatch(r"\d+", stale.name.removeprefix(prefix))
        if not pid or (is_alive(int(pid.group())) and stale != part):
            continue
        if identity and _identity(stale) == identity and (stale == part or not part.exists()):
            stale.rename(part)
        else:
            shutil.rmtree(stale, ignore_errors=True)
    for old in out.parent.glob(f".{out.name}.old-*"):  # killed between the two renames below
        shutil.rmtree(old) if out.exists() else old.rename(out)
    part.mkdir(exist_ok=True)
    keep = False
    try:
        yield part
        (part / PROGRESS).unlink(missing_ok=True)
        (part / SAMPLES).unlink(missing_ok=True)
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if not is_full(str(error)):
            raise
        have = shutil.disk_usage(out.parent).free
        raise UserError(
            f"{out}: the disk is full ({have / 1e6:.0f} MB free): make room or choose another --out"
        ) from error
    except KeyboardInterrupt:
        keep = (part / PROGRESS).is_file()
        raise
    finally:
        if not keep:
            shutil.rmtree(part, ignore_errors=True)


def _identity(part: Path) -> str | None:
    try:
        return json.loads((part / PROGRESS).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, last of all files: a folder with one is complete."""
    (folder / MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
