"""What of a segment is learnt: spans of its codes, carried beside them in the shards.

L codes of one segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm.data.batching.document import of_array
from mm.data.shards.members import member_modality
from mm.data.shards.reader import ShardSet
from mm.specs import Segment
from mm.vocabulary import Vocabulary

LOSS = "loss"  # of the side information of a member: [[first, stop], ...]; code L is the end


def sample_segments(shards: ShardSet, i: int, vocabulary: Vocabulary) -> list[Segment]:
    """Sample ``i`` of token shards, with what they say is learnt of it."""
    segments = {
        m: of_array(vocabulary.spec(member_modality(m)), found)
        for m, found in shards.tokens(i).items()
    }
    if not shards.says_loss:
        return [*segments.values()]
    side = shards.side(i)
    return [learn(segment, side.get(m, {})) for m, segment in segments.items()]


def learn(segment: Segment, side: Mapping[str, Any]) -> Segment:
    """The segment with its loss where ``side`` says so; without a word of it, as it is."""
    if LOSS not in side:
        return segment
    spans: Sequence[Sequence[int]] = side[LOSS]
    if not spans:
        return segment._replace(role="condition")
    ids = np.asarray(segment.ids)
    learnt = np.zeros(len(ids) + 1, bool)
    for first, stop in spans:
        learnt[first:stop] = True
    targets = np.where(learnt[:-1], ids, -1).astype(np.int32)
    if not learnt[-1]:
        targets = np.append(targets, np.int32(-1))
    return segment._replace(role="target", targets=targets)
