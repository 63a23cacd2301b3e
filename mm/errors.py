"""Errors that a user can mend. The CLI prints them as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LINE = 2_000  # characters of a line that are told; names and values in it may be a stranger's


class UserError(Exception):
    """The input is wrong; the message names where, and the command or key that mends it.

    Any terminal can show it: long lines lose their middle, half characters are told by number.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message).encode(errors="backslashreplace").decode()
        super().__init__("\n".join(map(_short, text.split("\n"))))


class Damaged(UserError):
    """A file is missing or damaged, perhaps on the machine of this process alone."""


def _short(line: str) -> str:
    if len(line) <= LINE:
        return line
    return f"{line[: LINE - 500]} [...] {line[-500:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a close match, else a list of what is ``known``."""
    options = sorted(map(str, known))
    close = difflib.get_close_matches(word[:80], options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}" if options else ""
