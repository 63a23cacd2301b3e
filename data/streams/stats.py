"""What a stream gave so far: tokens, samples and rejects, carried in its cursor.

The sums ride in the cursor, so that a resumed run reports what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = ("tokens", "source", "samples", "rejects")  # first parts of the names in the cursor


def accumulate(cursor: Mapping[str, int], **step: Mapping[Any, int]) -> dict[str, int]:
    """Sums up to and with this step, as entries of the next cursor.

    Args:
        cursor: of this step; holds the sums before it.
        step: group (of `GROUPS`) -> name -> count of this step.
    Returns:
        ``{"tokens/text": 1234, "samples/0": 56, ...}``
    """
    seen = {k: v for k, v in cursor.items() if k.partition("/")[0] in GROUPS and "/" in k}
    for group, counts in step.items():
        for name, n in counts.items():
            key = f"{group}/{name}"
            seen[key] = seen.get(key, 0) + n
    return seen


def summarize(seen: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Stats of the run so far from what `accumulate` gave.

    ``tokens_seen`` and ``token_shares`` by modality; ``source_tokens``, ``source_shares`` (of the
    tokens), ``source_samples`` and ``sample_shares`` by number of the source; ``rejects`` by
    reason.
    """
    group = {
        name: {k[len(name) + 1 :]: n for k, n in sorted(seen.items()) if k.startswith(name + "/")}
        for name in GROUPS
    }
    return {
        "tokens_seen": group["tokens"],
        "source_tokens": group["source"],
        "source_samples": group["samples"],
        "token_shares": as_shares(group["tokens"]),
        "source_shares": as_shares(group["source"]),
        "sample_shares": as_shares(group["samples"]),
        "rejects": group["rejects"],
    }


def as_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts as shares of their sum."""
    total = max(1, sum(counts.values()))
    return {name: n / total for name, n in counts.items()}
