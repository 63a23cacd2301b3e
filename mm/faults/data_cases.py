"""Faults of the data: damaged shards, bombs, pickles."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm.faults.bench import Bench
from mm.faults.case import KILLED, USER_ERROR, resume_and_compare
from mm.trainer.health.signals import INTERRUPTED


def truncated_shards(bench: Bench, quick: bool) -> Iterator[str]:
    """A tar of the data cut while the run was stopped: refused by name; then restored."""
    for size in (700,) if quick else (0, 700, 2048):
        config = bench.config(bench.fresh("tar"))
        fault = {"signal": "SIGTERM", "phase": "step", "step": 3}
        bench.whole(config)
        ended = bench.train(config, faults={"signal": fault})
        shard = next(iter(sorted(bench.tokens["both"].rglob("*.tar"))))
        good = shard.read_bytes()
        shard.write_bytes(good[:size])
        try:
            refused = bench.train(config)
        finally:
            shard.write_bytes(good)
        if refused.codes != [USER_ERROR] or shard.name not in refused.said:
            yield f"a tar of {size} bytes: exit codes {refused.codes}: {refused.said[-300:]}"
        else:
            yield resume_and_compare(bench, config, ended, INTERRUPTED)


def bombs(bench: Bench, quick: bool) -> Iterator[str]:
    """Headers that claim what no machine has: quarantined by name, the rest is packed."""
    import struct
    import zlib

    from PIL import Image

    from mm.data.pack.job import pack

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = lambda w, h: (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    wav = b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 2**32 - 1, 0, 2, 16)
    files = {
        "big.png": header(13000, 13000),
        "huge.png": header(2**31 - 1, 2**31 - 1),
        "cut.png": header(16, 16)[:40],
        "loud.wav": wav + b"data\xff\xff\xff\xff" + b"\0" * 100,
    }
    for name, data in files.items():
        raw = bench.root / bench.fresh("bomb")
        raw.mkdir()
        suffix = name[-3:]
        for i in range(5):
            (raw / f"good{i}.txt").write_text(f"text {i}")
            if suffix == "png":
                Image.new("RGB", (8, 8)).save(raw / f"good{i}.png")
            else:
                import soundfile

                soundfile.write(raw / f"good{i}.wav", np.zeros(400), 8000)
        (raw / f"bad.{suffix}").write_bytes(data)
        (raw / "bad.txt").write_text("beside a bomb")
        out = raw.with_name(raw.name + "-out")
        report = pack(raw, out, max_bad=0.5, progress=False)
        good = report.quarantined == 1 and sum(report.samples.values()) == 5
        yield "" if good else f"{name}: {report.quarantined} quarantined, {report.samples} packed"


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def pickles(bench: Bench, quick: bool) -> Iterator[str]:
    """As a checkpoint file: not read. As a member of a tar: refused. No code runs."""
    trap = bench.root / bench.fresh("trap")
    payload = pickle.dumps(_Bomb(trap))
    config = bench.config(bench.fresh("pickle"))
    fault = {"signal": "SIGKILL", "phase": "step", "step": 6}
    ended = bench.train(config, faults={"signal": fault})
    last = bench.folder(config) / "checkpoints" / "step_000004"
    (last / "model.pt").write_bytes(payload)
    (last / "model.optimizer.safetensors").write_bytes(payload)
    lost = resume_and_compare(bench, config, ended, KILLED)
    yield "code of the pickle ran" if trap.exists() else lost

    from mm.data.pack.job import pack

    raw = bench.root / bench.fresh("pickles.tar")
    with tarfile.open(raw, "w") as tar:
        for name, data in {"a.txt": b"fine", "b.txt": b"fine", "b.pyd": payload}.items():
            path = bench.root / "member"
            path.write_bytes(data)
            tar.add(path, name)
    tarred = raw.with_suffix(".tar")
    shutil.move(raw, tarred)
    out = tarred.with_name(tarred.stem + "-out")
    report = pack(tarred, out, max_bad=1.0, progress=False)
    yield "" if report.quarantined == 1 and not trap.exists() else "the member was not refused"
