"""What a step counts over micro-batches and ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch
from mm.layout import Doc, Layout
from mm.trainer.step import _global_counts

CPU = torch.device("cpu")


def batch(*modalities: int) -> Batch:
    """A row of one document and two places of padding."""
    n = len(modalities)
    layout = Layout.from_rows([[Doc(n, modality=np.array(modalities, np.int32))]], n + 2)
    return Batch.of_ids(torch.zeros(1, n + 2, dtype=torch.int64), layout)


@pytest.mark.parametrize("leads", [True, False])
def test_what_several_ranks_share_is_counted_by_the_first_of_them(leads: bool) -> None:
    """Denominators are of each rank's own places: those are summed whoever leads."""
    counts = iter([{"text": torch.tensor(3)}, {"text": torch.tensor(1), "nll": torch.tensor(7)}])
    stage: Any = SimpleNamespace(
        objective=SimpleNamespace(counts=lambda b: next(counts)),
        env=SimpleNamespace(leads=leads, device=CPU),
        stream=SimpleNamespace(counts={"rows": 5, "left out": 2}),
    )
    batches = [batch(1, 1, 2), batch(0, 2, 2, 2, 1)]  # 3 of text, 4 of image, 1 of control
    n, facts = _global_counts(stage, batches, batches, ("text", "image"), True)
    assert {k: v.item() for k, v in n.items()} == {"text": 4.0, "nll": 7.0}
    found = {k: v.tolist() for k, v in facts.items()}
    assert found == {
        "stop": 1.0,
        "stream": [5.0, 2.0] if leads else [0.0, 0.0],
        "tokens/step": 8.0 if leads else 0.0,
        "tokens/text_share": 3 / 8 if leads else 0.0,
        "tokens/image_share": 4 / 8 if leads else 0.0,
        "targets/text_share": 1.0,
    }
