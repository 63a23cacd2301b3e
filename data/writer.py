"""Write shards: WebDataset tars, their index and the manifest.

Everything goes to a temporary folder that is renamed when it is complete.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mm.data import index
from mm.data.shards import INDEX, MANIFEST
from mm.errors import UserError


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
    """Shards of one split. A new shard begins when the current one would pass ``shard_mb``."""

    def __init__(self, folder: Path, shard_mb: float):
        self.folder, self.limit = folder, int(shard_mb * 1e6)
        self.webdataset = secure_webdataset()
        self.shards: list[dict[str, Any]] = []
        self.lengths: dict[str, dict[str, int]] = {}
        self.samples = self._bytes = 0
        self._file: Any = None
        self._tar: Any = None
        folder.mkdir(parents=True)

    def write(self, key: str, files: Mapping[str, bytes], lengths: Mapping[str, int]) -> None:
        """Append one sample: ``files`` maps kind ("txt", "image.npy", ...) to content."""
        need = sum(512 + (len(data) + 511) // 512 * 512 for data in files.values())
        if self._tar is None or (self._bytes and self._bytes + need > self.limit):
            self._finish_shard()
            name = f"shard-{len(self.shards):06d}.tar"
            self._file = open(self.folder / name, "wb")  # noqa: SIM115  a path would be refused in secure mode
            self._tar = self.webdataset.TarWriter(self._file, encoder=False, mtime=0)
            self.shards.append({"name": name, "samples": 0})
            self._bytes = 0
        self._tar.write({"__key__": key, **files})
        self._bytes += need
        self.samples += 1
        self.shards[-1]["samples"] += 1
        self.lengths[key] = dict(lengths)

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
        summary = {}
        for modality, values in sorted(built.lengths.items()):
            have = values[values >= 0]
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


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well.

    It vanishes when the block fails.

    A folder that a killed run left behind is removed first; ``out`` itself is never seen half
    written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.part-"
    for stale in out.parent.glob(f"{prefix}*"):
        pid = re.fullmatch(r"\d+", stale.name.removeprefix(prefix))
        if pid and not _alive(int(pid.group())):
            shutil.rmtree(stale, ignore_errors=True)
    for old in out.parent.glob(f".{out.name}.old-*"):  # killed between the two renames below
        shutil.rmtree(old) if out.exists() else old.rename(out)
    part = out.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        have = shutil.disk_usage(out.parent).free
        raise UserError(
            f"{out}: the disk is full ({have / 1e6:.0f} MB free): make room or choose another --out"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, last of all files: a folder with one is complete."""
    (folder / MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
