"""The first conversations of a pack as a model will read them: encoded, and decoded again."""

from __future__ import annotations

from itertools import islice

from mm.data.batching.document import of_array
from mm.data.chat.encode import ChatEncoder
from mm.data.chat.loss import learn
from mm.data.chat.show import learnt_runs
from mm.data.pack.encode import Item
from mm.data.pack.job import PackJob
from mm.data.pack.worker import Work
from mm.data.shards.members import member_modality
from mm.data.sources.chat import ChatSource

SHOWN = 3


def preview(job: PackJob, n: int = SHOWN) -> list[tuple[str, list[tuple[str, bool]]]]:
    """(key, texts with whether they are learnt) of the first ``n`` conversations that can be used.

    None of another source.
    """
    if not isinstance(job.source, ChatSource) or not isinstance(job.encoder, ChatEncoder):
        return []
    assert job.vocabulary is not None
    work, shown = Work(job.modalities, None, job.encoder), []
    prepared = (work.prepare(record) for record in job.source)
    items = [Item(p.raws, p.record.key) for p in islice((p for p in prepared if not p.bad), n)]
    for key, encoded, bad in job.encoder.encode(items):
        if bad:
            continue
        segments = [
            learn(
                of_array(
                    job.vocabulary.spec(member_modality(member)),
                    code.ids if code.values is None else code.values,
                ),
                code.side,
            )
            for member, code in sorted(encoded.items())  # by place: texts came before media
        ]
        shown.append((key, learnt_runs(segments, job.vocabulary, job.encoder.tokenizers)))
    return shown
