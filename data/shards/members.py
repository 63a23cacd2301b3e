"""Names of the members of a sample: its values, one a modality or one a segment.

A sample of one value a modality has the members ``text``, ``image``, ...; an interleaved one has a
member for each segment, in order: ``000.text``, ``001.image``, ``002.text``. The tar entry of a
member has the file's extension instead of the modality: ``000.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_SEGMENTS = 1000  # of one sample: three digits keep the order of names that of segments
_ORDINAL = re.compile(r"\d{3}\.")


def member_name(number: int, modality: str) -> str:
    """Member of one segment of an interleaved sample.

    >>> member_name(1, "image")
    '001.image'
    """
    return f"{number:03d}.{modality}"


def split_ordinal(member: str) -> tuple[str, str]:
    """Ordinal with its dot ("" where there is none), and what follows it.

    >>> split_ordinal("001.image"), split_ordinal("image")
    (('001.', 'image'), ('', 'image'))
    """
    found = _ORDINAL.match(member)
    return (member[: found.end()], member[found.end() :]) if found else ("", member)


def member_modality(member: str) -> str:
    """Modality of a member."""
    return split_ordinal(member)[1]


def segment_words(member: str) -> str:
    """Words that say which segment of the sample it is; "" where the sample has none.

    >>> segment_words("001.image"), segment_words("image")
    ('segment 1: ', '')
    """
    ordinal = split_ordinal(member)[0]
    return f"segment {int(ordinal[:3])}: " if ordinal else ""


def members_of(members: Iterable[str], modality: str) -> list[str]:
    """The members that hold a modality, in order."""
    return [member for member in members if member_modality(member) == modality]


def sum_by_modality(lengths: Mapping[str, int]) -> dict[str, int]:
    """Length by member to length by modality."""
    out: dict[str, int] = {}
    for member, n in lengths.items():
        modality = member_modality(member)
        out[modality] = out.get(modality, 0) + n
    return out
