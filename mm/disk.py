"""What a disk says that takes no more."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm.errors import UserError

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def disk_error(error: BaseException) -> str | None:
    """What the disk said, for an error of its own or of safetensors; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if type(error).__name__ == "SafetensorError" else None


def is_full(reason: str) -> bool:
    """Whether what the disk said is that it, a quota or a limit on file sizes is full."""
    return any(words in reason for words in _FULL)


@contextmanager
def tell_if_full(path: str | Path, mend: str) -> Iterator[None]:
    """Turn the error of a full disk inside the block into a UserError; others pass.

    Args:
        path: what is being written, for the message.
        mend: what to do, besides making room.
    """
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None or not is_full(reason):
            raise
        raise UserError(
            f"{path}: cannot be written, the disk or a quota is full ({reason}): make room{mend}"
        ) from error
