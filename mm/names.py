"""Names that become files and folders: one rule for runs, splits, shards, samples, modalities."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

LONGEST = 200  # bytes; file systems take 255, and suffixes are added
_CONTROL = re.compile(r"[\x00-\x1f\x7f/\\]")


def plain_name(value: str) -> str:
    """Return a name that is one component of a path, whatever the system.

    Raises ValueError on an empty one, one of dots alone, with a slash or a control character, too
    long, or that no file system could write.
    """
    if not value.strip() or set(value) == {"."} or _CONTROL.search(value):
        raise ValueError(
            f"{value[:40]!r} is no plain name: no slash, no control character, not '.'"
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"a name must be valid Unicode ({error.reason})") from error
    if size > LONGEST:
        raise ValueError(f"a name of {size} bytes is too long; at most {LONGEST}")
    return value


PlainName = Annotated[str, AfterValidator(plain_name)]
