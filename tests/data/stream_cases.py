"""Configs of every kind of stream, over the shards of 37 samples that the fixture `data` makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mm.config import Config
from mm.data.streams.bucketed import BucketedConfig
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.stateful import StatefulConfig

N = 37


TASKS = {
    "kind": "any_to_any",
    "condition_dropout": 0.3,
    "tasks": {"image>text": 1, "text>image": 1, "audio>text": 1, "image+text>audio": 1, "text": 1},
}


DROP = {"kind": "any_to_any", "tasks": {"audio>text": 1, "text": 1}, "condition_dropout": 0.5}


CASES: dict[str, Callable[[Path], Config]] = {
    "packed": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "weight": 3},
            {"path": d / "tokens", "transform": [{"kind": "chunk", "tokens": 5}]},
        ],
        seq_len=48,
        batch_size=4,
        max_documents=4,
        block_samples=16,
    ),
    "packed-transform": lambda d: PackedConfig(
        sources=[{"path": d / "tokens"}],
        seq_len=64,
        batch_size=4,
        max_documents=6,
        block_samples=20,
        transform=[TASKS],
    ),
    "packed-cut": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "transform": [{"kind": "any_to_any", "tasks": {"text": 1}}]}
        ],
        seq_len=12,
        batch_size=4,
        max_documents=4,
        block_samples=8,
        cut=True,
    ),
    "packed-mixed": lambda d: PackedConfig(
        sources=[
            {"path": d / "tokens", "weight": {0: 1, 200: 4}},
            {"path": d / "tokens", "transform": [{"kind": "chunk", "tokens": 5}]},
        ],
        seq_len=48,
        batch_size=4,
        max_documents=4,
        block_samples=16,
        weights="tokens",
        shuffle="window",
        window_samples=8,
    ),
    "bucketed": lambda d: BucketedConfig(
        source={"path": d / "tokens"}, buckets=(2, 3), batch_size=4, tokens=800, transform=[DROP]
    ),
    "stateful": lambda d: StatefulConfig(
        source={"path": d / "tokens"}, seq_len=11, batch_size=4, max_documents=3, max_length=80
    ),
    "items": lambda d: ItemsConfig(
        path=d / "shards",
        batch_size=8,
        size=6,
        augment={"shift": 0.1, "rotate_deg": 9, "scale": 0.1, "flip": 0.5},
    ),
    "items-audio": lambda d: ItemsConfig(
        path=d / "shards",
        modality="audio",
        batch_size=8,
        sample_rate=8000,
        crop_seconds=0.03,
        loudness="rms",
        repeat="unique",
    ),
}
