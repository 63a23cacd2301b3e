"""Slots: where a value stands in its sample.

A sample of one value a modality has the slots ``text``, ``image``, ...; an interleaved one has a
slot for each segment, in order: ``000.text``, ``001.image``, ``002.text``. The same names, with a
file's extension for the modality, are the members of a shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_SEGMENTS = 1000  # of one sample: three digits keep the order of names that of segments
_ORDINAL = re.compile(r"\d{3}\.")


def slot_of(number: int, modality: str) -> str:
    """Slot of a segment.

    >>> slot_of(1, "image")
    '001.image'
    """
    return f"{number:03d}.{modality}"


def parse(slot: str) -> tuple[str, str]:
    """Ordinal with its dot ("" where there is none), and what follows it.

    >>> parse("001.image"), parse("image")
    (('001.', 'image'), ('', 'image'))
    """
    found = _ORDINAL.match(slot)
    return (slot[: found.end()], slot[found.end() :]) if found else ("", slot)


def modality_in(slot: str) -> str:
    """Modality of a slot."""
    return parse(slot)[1]


def place(slot: str) -> str:
    """Words that say which segment of the sample it is; "" where the sample has none.

    >>> place("001.image"), place("image")
    ('segment 1: ', '')
    """
    ordinal = parse(slot)[0]
    return f"segment {int(ordinal[:3])}: " if ordinal else ""


def of_modality(slots: Iterable[str], modality: str) -> list[str]:
    """The slots that hold a modality, in order."""
    return [slot for slot in slots if modality_in(slot) == modality]


def summed(lengths: Mapping[str, int]) -> dict[str, int]:
    """Length by slot to length by modality."""
    out: dict[str, int] = {}
    for slot, n in lengths.items():
        modality = modality_in(slot)
        out[modality] = out.get(modality, 0) + n
    return out
