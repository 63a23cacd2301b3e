"""Blocks of a packed stream: whole documents laid into rows by their lengths, before any is read.

A block is a pure function of the seed and its number. Row stream r of R owns one block of every
round of R blocks.

D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm.data.streams.shuffle import key_of, permute
from mm.specs import Segment

WORTH = 0.02  # share of the rows that longest first must save


# What the transforms made of a sample's whole segments: each with codes that are all 0, and whose
# they are (a modality; "": it has none). It is filled with codes where the document is read.
Sketch = tuple[tuple[str, Segment], ...]


class Document(NamedTuple):
    """One document of a row: which sample it is, or which part of one that is cut."""

    source: int
    epoch: int
    sample: int
    part: int
    length: int  # tokens
    others: tuple[int, ...] = ()  # tokens of its second sequences
    sketch: Sketch | None = None


class Block(NamedTuple):
    """Rows of one block and what was left out of it."""

    rows: list[list[Document]]
    filtered: int
    too_long: int


def block_of(seed: int, row: int, turn: int, rows: int) -> int:
    """Number of the block that row stream ``row`` of ``rows`` reads as its ``turn``-th.

    A round of ``rows`` blocks goes to the streams in their order, begun at a drawn place: so none
    always gets the block in which a rare source comes.
    """
    return turn * rows + (row + key_of(seed, "turn", turn)) % rows


def sketch_of(outline: Sequence[Segment], made: Sequence[Segment]) -> Sketch | None:
    """What transforms that look at lengths alone made of ``outline``, to be filled with codes.

    None where a segment's codes, targets or values are the transforms' own.
    """
    whose = {id(s.ids): s.modality for s in outline}
    out = []
    for s in made:
        m = "" if s.ids is None else whose.get(id(s.ids))
        if m is None or s.targets is not None or s.values is not None:
            return None
        out.append((m, s))
    return tuple(out)


def lay_rows(
    documents: Sequence[Document], seq_len: int, max_documents: int, key: int, part_len: int = 0
) -> list[list[Document]]:
    """Rows of documents, mixed.

    Packed first fit in a drawn order; longest first where that takes `WORTH` fewer rows. Rows of a
    drawn order are alike, so what a step holds varies less. Second sequences share rows of
    ``part_len`` tokens as their documents do.
    """
    drawn = permute(np.arange(len(documents)), len(documents), key)
    lengths = np.array([d.length for d in documents], np.int64)
    longest = drawn[np.argsort(-lengths[drawn], kind="stable")]
    others = np.array([d.others for d in documents], np.int64).reshape(
        len(documents), len(documents[0].others) if documents else 0
    )
    rows, other = (
        first_fit(lengths[order], seq_len, max_documents, order, others[order], part_len)
        for order in (drawn, longest)
    )
    if len(other) < (1 - WORTH) * len(rows):
        rows = other
    # The rows that were opened last are the emptier ones: spread them over the steps of the block.
    mixed = permute(np.arange(len(rows)), len(rows), key_of(key, "rows"))
    return [[documents[i] for i in rows[r]] for r in mixed.tolist()]


def first_fit(
    lengths: np.ndarray,
    seq_len: int,
    max_documents: int,
    names: np.ndarray | None = None,
    others: np.ndarray | None = None,
    part_len: int = 0,
) -> list[list[int]]:
    """Put each document into the first row that has room for it, opening rows as needed.

    Args:
        lengths: (D,) tokens, each at most ``seq_len``.
        names: (D,) of the documents in the rows; default their numbers.
        others: (D, K) tokens of second sequences, each at most ``part_len``, the room of a row.
    """
    named = range(len(lengths)) if names is None else names.tolist()
    if others is None or not others.shape[1]:
        return _first_fit(lengths.tolist(), seq_len, max_documents, named)
    free = np.zeros(max(1, len(lengths)), np.int64)
    spare = np.zeros((max(1, len(lengths)), others.shape[1]), np.int64)
    rows: list[list[int]] = []
    for i, (n, name) in enumerate(zip(lengths.tolist(), named, strict=True)):
        fits = (free[: len(rows)] >= n) & (spare[: len(rows)] >= others[i]).all(1)
        at = int(np.argmax(fits)) if rows else 0
        if not rows or not fits[at]:
            at = len(rows)
            free[at], spare[at] = seq_len, part_len
            rows.append([])
        rows[at].append(name)
        free[at] = -1 if len(rows[at]) >= max_documents else free[at] - n
        spare[at] -= others[i]
    return rows


def _first_fit(
    lengths: Sequence[int], seq_len: int, max_documents: int, names: Sequence[int]
) -> list[list[int]]:
    """`first_fit` by a tree of the room of rows: each node has the most of its two below.

    The first row with room is found in as many steps as the tree is high; a row that is not open
    yet has all of it.
    """
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [seq_len] * (2 * leaves)  # node 1 is the root, leaf r is node leaves + r
    rows: list[list[int]] = []
    for n, name in zip(lengths, names, strict=True):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < n:
                node += 1
        at = node - leaves
        if at == len(rows):
            rows.append([name])
        else:
            rows[at].append(name)
        left = -1 if len(rows[at]) >= max_documents else room[node] - n
        room[node] = left
        while node > 1:  # up to where the most below is another's
            node //= 2
            a, b = room[2 * node], room[2 * node + 1]
            most = a if a > b else b
            if room[node] == most:
                break
            room[node] = most
    return rows
