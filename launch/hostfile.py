"""DeepSpeed-style hostfiles: ``host slots=N`` a line, comments, hosts taken in or left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mm.errors import UserError, did_you_mean

_LINE = re.compile(r"(?P<host>[^\s=]+)\s+slots=(?P<slots>\d+)")
_HOST = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9_][\w.:-]*")


class Host(NamedTuple):
    """A machine: its name for ssh, the slots that may be used, and where it is written."""

    name: str
    slots: tuple[int, ...]
    line: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order. Raises UserError with the number of the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such hostfile; write one line a machine: NAME slots=GPUS"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, origin: str = "hostfile") -> list[Host]:
    """The hosts of a hostfile's text. Raises UserError with the number of the line."""
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].strip()
        if not content:
            continue
        where = f"{origin}:{number}"
        found = _LINE.fullmatch(content)
        if found is None:
            raise UserError(f"{where}: '{content[:60]}' is not of the form: HOST slots=N")
        name, slots = found["host"], int(found["slots"])
        if not _HOST.fullmatch(name):  # a leading dash would be an option of ssh
            raise UserError(f"{where}: '{name[:60]}' is no name of a host")
        if not 0 < slots <= 1024:
            raise UserError(f"{where}: slots={slots}: must be 1 to 1024")
        if name in hosts:
            raise UserError(f"{where}: '{name}' stands in line {hosts[name].line} already")
        hosts[name] = Host(name, tuple(range(slots)), number)
    if not hosts:
        raise UserError(f"{origin}: names no host; write one line a machine: NAME slots=GPUS")
    return list(hosts.values())


def select(hosts: list[Host], include: str = "", exclude: str = "") -> list[Host]:
    """DeepSpeed's ``--include`` or ``--exclude``: ``host1@host2:0,2`` names hosts and their slots.

    Raises UserError on both at once, on what is not there, and when nothing is left.
    """
    if include and exclude:
        raise UserError("include and exclude: give one of them")
    if not include and not exclude:
        return hosts
    word, text = ("include", include) if include else ("exclude", exclude)
    known = {host.name: host for host in hosts}
    named: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in known:
            raise UserError(f"{word}: no host '{name}'{did_you_mean(name, known)}")
        if not colon:
            named[name] = None
            continue
        slots = []
        for number in numbers.split(","):
            if not number.isdigit() or int(number) not in known[name].slots:
                raise UserError(
                    f"{word}: '{name}' has no slot '{number}', only "
                    f"0 to {len(known[name].slots) - 1}"
                )
            slots.append(int(number))
        named[name] = tuple(slots)
    out = []
    for host in hosts:
        given = named.get(host.name)
        whole = host.name in named and given is None
        if include:
            slots = host.slots if whole else given or ()
        else:
            slots = () if whole else tuple(s for s in host.slots if s not in (given or ()))
        if slots:
            out.append(host._replace(slots=slots))
    if not out:
        raise UserError(f"{word}: leaves no host")
    return out
