"""Shards behind a URL: fetched when they are first read, kept in a local cache by content hash.

The manifest names every file with its SHA-256, so a file is trusted because of what it is, not of
where it came from, and two mirrors of one data set share their cache. ``MM_DATA_CACHE`` is the
folder (default ~/.cache/mm/data), ``MM_DATA_CACHE_GB`` its cap (default none): the files unused for
longest go first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from uuid import uuid4

from pydantic import BeforeValidator

from mm.errors import UserError

log = logging.getLogger(__name__)
ATTEMPTS, TIMEOUT, PIECE = 4, 60.0, 1 << 20
SMALL_BYTES = 1 << 28  # cap of a file whose size is not known before


def is_url(location: str | Path) -> bool:
    """True for "scheme://..."; a plain path is none."""
    return "://" in str(location)


def _location(value: Any) -> Any:
    if not isinstance(value, (str, Path)):
        raise ValueError("a folder or a URL, as text")
    return value if isinstance(value, str) and is_url(value) else Path(value)


# A local folder, or a URL that fsspec or HTTP can read; `Path` would fold the two slashes.
Location = Annotated[Path | str, BeforeValidator(_location)]


def cache_folder() -> Path:
    """Where fetched files are kept."""
    given = os.environ.get("MM_DATA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "mm" / "data"


def join(url: str, *parts: str) -> str:
    """Append path components, quoted as the scheme needs it; a query or "#..." stays at the end."""
    if url.startswith(("http://", "https://")):
        split = urllib.parse.urlsplit(url)
        path = "/".join([split.path.rstrip("/"), *map(urllib.parse.quote, parts)])
        return urllib.parse.urlunsplit(split._replace(path=path))
    return "/".join([url.rstrip("/"), *parts])


def fetch(url: str, sha256: str, size: int | None) -> Path:
    """Local copy of a file whose content is known.

    Raises:
        UserError: it cannot be read, or its content is another one.
    """
    path = cache_folder() / "files" / sha256[:2] / sha256
    if path.is_file() and size in (None, path.stat().st_size):
        os.utime(path)  # used just now
        return path
    _make_room(size or 0)
    _download(url, path, size, sha256)
    return path


def read_small(url: str) -> bytes:
    """Content of a file that has no known hash: the manifest itself. Asked for anew each time.

    Raises UserError.
    """
    path = cache_folder() / f"small-{uuid4().hex}"
    try:
        _download(url, path, None, None)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def _download(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    """Fetch to a temporary name, compare size and hash, rename. Retries what may be passing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{uuid4().hex[:8]}")
    cap = SMALL_BYTES if size is None else size
    try:
        for attempt in range(ATTEMPTS):
            try:
                have, digest = _copy(url, part, cap)
            except (FileNotFoundError, PermissionError) as error:
                raise UserError(f"{url}: {_reason(error)}") from error
            except (OSError, ValueError, ImportError) as error:
                if attempt + 1 == ATTEMPTS or isinstance(error, (ValueError, ImportError)):
                    raise UserError(f"{url}: {_reason(error)}") from error
                log.warning("%s: %s; trying again", url, _reason(error))
                time.sleep(0.2 * 4**attempt)
                continue
            if have <= cap and size in (None, have) and sha256 in (None, digest):
                part.replace(path)
                return
            if attempt + 1 == ATTEMPTS:
                raise UserError(
                    f"{url}: {have} bytes of SHA-256 {digest[:12]}..., the manifest says {size} "
                    f"and {(sha256 or '')[:12]}...: restore the file there"
                )
    finally:
        part.unlink(missing_ok=True)


def _copy(url: str, part: Path, cap: int) -> tuple[int, str]:
    digest, have = hashlib.sha256(), 0
    with _open(url) as source, open(part, "wb") as out:
        while piece := source.read(PIECE):
            have += len(piece)
            if have > cap:
                break  # longer than it may be: the caller compares the size
            digest.update(piece)
            out.write(piece)
    return have, digest.hexdigest()


def _open(url: str) -> BinaryIO:
    if url.startswith(("http://", "https://")):  # the standard library: fsspec would need aiohttp
        try:
            return urllib.request.urlopen(url, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise PermissionError(f"HTTP {error.code}") from error
            if error.code in (404, 410):
                raise FileNotFoundError(f"HTTP {error.code}") from error
            raise
    import fsspec

    return fsspec.open(url, "rb").open()  # type: ignore[return-value]


def _make_room(size: int) -> None:
    """Drop the files unused for longest until ``size`` more fits the cap.

    A file that a process has mapped stays readable for it: only its name goes.
    """
    cap = os.environ.get("MM_DATA_CACHE_GB")
    if not cap:
        return
    found = []
    for path in (cache_folder() / "files").glob("??/*"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        found.append((stat.st_mtime, stat.st_size, path))
    total = sum(n for _, n, _ in found)
    for _, n, path in sorted(found):
        if total + size <= float(cap) * 1e9:
            break
        path.unlink(missing_ok=True)
        total -= n


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
