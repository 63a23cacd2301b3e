"""Where segments begin and end: ids of their borders, and how many tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from mm.specs import Segment


def is_main(s: Segment) -> bool:
    """Whether a segment stands in the main sequence."""
    return not s.part and s.role != "label"


class Border(NamedTuple):
    """Ids around a segment's codes: modality whose begin stands before, whose end behind, or ""."""

    begin: str
    end: str


NO_BORDER = Border("", "")


@cache
def _both(modality: str) -> Border:
    return Border(modality, modality)


def borders(segments: Sequence[Segment]) -> list[Border]:
    """The borders of each segment of one sequence.

    A segment has its own begin and end. One that is inline has none: it belongs to the span before
    it, else to the one behind it, and that span goes on after it where the same modality does. So
    text, picture, text are one span of text, as LLaVA (arXiv:2304.08485) reads them. Labels and
    null conditions have no borders.
    """
    if not any([s.inline for s in segments]):  # a list is quicker than a generator
        return [
            NO_BORDER if s.ids is None or s.role == "label" else _both(s.modality) for s in segments
        ]
    spans: list[list[int]] = []
    open_span = False  # nothing stands between the last one and what comes
    for i, s in enumerate(segments):
        if s.role == "label":
            continue
        before = spans[-1] if open_span else []
        joins = before and (s.inline or segments[before[-1]].inline)
        if joins and (s.inline or _host(segments, before) in ("", s.modality)):
            before.append(i)
        elif s.ids is not None:
            spans.append([i])
        open_span = s.ids is not None
    out = [NO_BORDER] * len(segments)
    for span in spans:
        name = _host(segments, span) or segments[span[0]].modality
        out[span[0]] = out[span[0]]._replace(begin=name)
        out[span[-1]] = out[span[-1]]._replace(end=name)
    return out


def _host(segments: Sequence[Segment], span: Sequence[int]) -> str:
    """Modality of a span's ids; "" of values alone."""
    return next((segments[i].modality for i in span if not segments[i].inline), "")


def segment_lengths(segments: Sequence[Segment]) -> list[int]:
    """Tokens of each segment of one sequence with its borders, 1 of a null condition."""
    if not any([s.inline for s in segments]):  # borders are then each segment's own
        return [
            0 if s.role == "label" else 1 if s.ids is None else len(s.ids) + 2 for s in segments
        ]
    return lengths_within(segments, borders(segments))


def lengths_within(segments: Sequence[Segment], around: Sequence[Border]) -> list[int]:
    """`segment_lengths` where the `borders` are known."""
    return [
        0 if s.role == "label" else 1 if s.ids is None else len(s.ids) + (begin != "") + (end != "")
        for s, (begin, end) in zip(segments, around, strict=True)
    ]


def document_length(segments: Sequence[Segment]) -> int:
    """Tokens of a document's main sequence, see `segment_lengths`."""
    total = 0
    for s in segments:
        if s.part or s.inline:  # borders are then not each segment's own
            return sum(segment_lengths([s for s in segments if not s.part]))
        if s.role != "label":
            total += 1 if s.ids is None else len(s.ids) + 2
    return total


def part_lengths(segments: Sequence[Segment]) -> dict[str, int]:
    """Tokens of each second sequence of a document."""
    names = dict.fromkeys(s.part for s in segments if s.part)
    return {name: sum(segment_lengths([s for s in segments if s.part == name])) for name in names}
