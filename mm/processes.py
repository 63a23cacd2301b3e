"""Whether processes of this machine live."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """True while a process of this machine has that id; a group's id (0 and below) is none."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
