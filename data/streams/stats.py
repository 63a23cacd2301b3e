"""What a stream gave so far: tokens, samples and rejects, carried in its cursor.

The sums ride in the cursor, so that a resumed run reports what an unbroken one does. Each rank has
those of its own rows; the trainer adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = ("tokens", "source", "samples", "rejects")  # first parts of the names in the cursor
SEEN = "seen/"  # of the counts that are sums of the run so far


def is_sum(name: str) -> bool:
    """Whether an entry of a cursor is a sum, not a place."""
    group, slash, _ = name.partition("/")
    return bool(slash) and group in GROUPS


def accumulate(cursor: Mapping[str, int], step: Mapping[str, int]) -> dict[str, int]:
    """Sums up to and with this step, as entries of the next cursor.

    Args:
        cursor: of this step; holds the sums before it.
        step: counts of this step; those named ``<group>/<name>`` with a group of `GROUPS` are added
            up.
    Returns:
        ``{"tokens/text": 1234, "samples/0": 56, ...}``
    """
    seen = {k: v for k, v in cursor.items() if is_sum(k)}
    for key, n in step.items():
        if is_sum(key):
            seen[key] = seen.get(key, 0) + n
    return seen


def with_sums(counts: Mapping[str, int], seen: Mapping[str, int]) -> dict[str, int]:
    """Counts of a step, and the sums so far among them."""
    return {**counts, **{SEEN + key: n for key, n in seen.items()}}


def names_with_sums(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of what `with_sums` gives."""
    return (*names, *(SEEN + name for name in names if is_sum(name)))


def in_group(counts: Mapping[str, int], group: str) -> dict[str, int]:
    """Counts named ``<group>/<name>`` by name."""
    return {k[len(group) + 1 :]: n for k, n in counts.items() if k.startswith(group + "/")}


def summarize(counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Stats of the run so far from the sums among ``counts``.

    ``tokens_seen`` and ``token_shares`` by modality; ``source_tokens``, ``source_shares`` (of the
    tokens), ``source_samples`` and ``sample_shares`` by number of the source; ``rejects`` by
    reason.
    """
    seen = in_group(counts, SEEN[:-1])
    group = {name: in_group(seen, name) for name in GROUPS}
    tokens = {m: n for m, n in group["tokens"].items() if n}
    return {
        "tokens_seen": tokens,
        "source_tokens": group["source"],
        "source_samples": group["samples"],
        "token_shares": as_shares(tokens),
        "source_shares": as_shares(group["source"]),
        "sample_shares": as_shares(group["samples"]),
        "rejects": group["rejects"],
    }


def padding_share(counts: Mapping[str, int]) -> float:
    """Share of the ``places`` of the rows that are not ``used``."""
    return 1 - counts["used"] / max(1, counts["places"])


def as_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts as shares of their sum."""
    total = max(1, sum(counts.values()))
    return {name: n / total for name, n in counts.items()}
